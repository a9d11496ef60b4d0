//! A client process that the tests start, and kill.
//!
//! `client-under-test SOCKET hold` opens sequences full of rows, says `holding`, and stays.
//! `client-under-test SOCKET work SECONDS` decodes and checks every answer, says how many it got, and ends.
//! `client-under-test ADMIN-SOCKET meddle UID SESSION SEQUENCE IMAGE` asks for what is that user's, and says what it got.

use std::path::Path;
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Hint, Member, Options};
use kvoyant_daemon::admin::{
    AdminError, BringOrder, ConfigPatch, EvictOrder, SuspendOrder, bring_image, drain, evict, fetch_config,
    fetch_sequences, fetch_status, reload_config, remove_image, set_config, set_log, suspend_sequence,
};
use kvoyant_tests::fake;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, command, rest @ ..] = arguments.as_slice() else {
        return Err("usage: client-under-test SOCKET hold|work|meddle …".into());
    };
    if command == "meddle" {
        return meddle(Path::new(socket), rest);
    }
    let model = Client::connect(Path::new(socket), Options::default())?
        .register(fake::spec(&["random:budget=50%"]), &[])?;
    let sequences: Vec<_> = (0..4)
        .map(|seed| {
            let sequence = model.open(0, 300)?;
            fake::fill(&model, &sequence, seed, 300)?;
            Ok(sequence)
        })
        .collect::<Result<_, Error>>()?;
    if command == "hold" {
        println!("holding");
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
    let until = Instant::now() + Duration::from_secs_f64(rest.first().map_or(Ok(1.0), |text| text.parse())?);
    let mut answers = 0;
    while Instant::now() < until {
        let members: Vec<_> =
            sequences.iter().map(|sequence| Member { sequence, position: 300, hint: Hint::None }).collect();
        let ready = model.speculate(1, &members)?.wait(kvoyant_tests::PATIENCE)?;
        for (member, seed) in (0..4).enumerate() {
            fake::check(&ready, member, seed, 1).map_err(|problem| format!("a wrong answer: {problem}"))?;
        }
        answers += 1;
    }
    println!("{answers}");
    Ok(())
}

/// One line for each thing that was tried: its HTTP status, or what was seen.
fn meddle(socket: &Path, rest: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let [uid, session, sequence, image] = rest else { return Err("UID SESSION SEQUENCE IMAGE".into()) };
    let uid: u32 = uid.parse()?;
    let status = |error: AdminError| match error {
        AdminError::Refused { status, .. } => status.to_string(),
        other => other.to_string(),
    };
    let sessions = fetch_status(socket)?.sessions.len();
    let list = fetch_sequences(socket)?;
    println!("{sessions} sessions, {} sequences, {} images", list.sequences.len(), list.images.len());
    let order = SuspendOrder {
        session: session.parse()?,
        sequence: sequence.clone(),
        image: "stolen".into(),
        overwrite: false,
        label: String::new(),
    };
    println!("suspend {}", suspend_sequence(socket, &order).map_or_else(status, |_| "done".into()));
    let order = BringOrder { image: image.clone(), uid: Some(uid) };
    println!("bring {}", bring_image(socket, &order).map_or_else(status, |_| "done".into()));
    let order = BringOrder { image: image.clone(), uid: None };
    println!("bring own {}", bring_image(socket, &order).map_or_else(status, |_| "done".into()));
    println!("rm {}", remove_image(socket, uid, image).map_or_else(status, |_| "done".into()));
    let evicts = |order: &EvictOrder| evict(socket, order).map_or_else(status, |_| "done".into());
    println!("evict {}", evicts(&EvictOrder { session: Some(session.parse()?), sequence: None }));
    println!("evict all {}", evicts(&EvictOrder::default()));
    println!("drain {}", drain(socket, true).map_or_else(status, |_| "done".into()));
    println!("undrain {}", drain(socket, false).map_or_else(status, |_| "done".into()));
    let patch = ConfigPatch::from([("max_sessions".to_owned(), 1.into())]);
    println!("set {}", set_config(socket, &patch).map_or_else(status, |_| "done".into()));
    println!("reload {}", reload_config(socket).map_or_else(status, |_| "done".into()));
    println!("log {}", set_log(socket, "trace").map_or_else(status, |_| "done".into()));
    println!("look {}", fetch_config(socket).map_or_else(status, |_| "done".into()));
    Ok(())
}
