//! A client process that the tests start, and kill.
//!
//! `client-under-test SOCKET hold` opens sequences full of rows, says `holding`, and stays.
//! `client-under-test SOCKET work SECONDS` decodes and checks every answer, says how many it got, and ends.

use std::path::Path;
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Hint, Member, Options};
use kvoyant_tests::fake;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, command, rest @ ..] = arguments.as_slice() else {
        return Err("usage: client-under-test SOCKET hold|work [SECONDS]".into());
    };
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
