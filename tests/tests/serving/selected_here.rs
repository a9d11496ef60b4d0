//! Selection in the client's own process: the rows, logits and certificates that a lane gives, and nothing kept in the daemon.

use std::sync::Arc;
use std::time::Duration;

use kvoyant_client::{Error, Failure, Hint, Member, SelectedBy, Status};
use kvoyant_engine::calibrate::calibrate;
use kvoyant_engine::{
    DaemonError, DaemonKv, DaemonOptions, DaemonSequence, Decoder, DecoderOptions, Dtype, Format, KvBackend,
    KvShape, Model, PrefillOptions, Selects, argmax, synthetic,
};
use kvoyant_methods::MethodSpec;
use kvoyant_tests::{Daemon, http};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

/// Long enough for heads to be looked at side by side.
const PROMPT: usize = 700;

/// Those that merge means come last: a lane's cross as f16.
const METHODS: [&str; 11] = [
    "kvoyant:budget=24,tail=off",
    "kvoyant:budget=24,tail=off,hint=ahead",
    "quest:budget=64,hint=current",
    "hata:budget=48",
    "window",
    "kvoyant:budget=24",
    "kvoyant:budget=24,bits=4,group=16,scope=head",
    "kvoyant:budget=24,hint=ahead",
    "kvoyant:budget=24,hint=previous,correct=0",
    "kvoyant:max_missed_mass=0.01",
    "kvoyant:max_missed_mass=0.01,hint=ahead",
];

/// Of the methods, those that merge no means.
const EXACT: usize = 5;

fn prompt(model: &Model) -> Vec<u32> {
    let vocabulary = model.config().vocabulary as u32;
    (0..PROMPT as u32).map(|i| i.wrapping_mul(2_654_435_761).rotate_left(11) % vocabulary).collect()
}

fn connect(daemon: &Daemon, model: &Arc<Model>, methods: &[&str], selects: Selects) -> DaemonKv {
    let methods: Vec<MethodSpec> = methods.iter().map(|text| text.parse().unwrap()).collect();
    let shape = KvShape::new(model.config(), Format::Plain(Dtype::F16));
    let mut options =
        DaemonOptions { dense_layers: 1, window: 16, methods, selects, ..DaemonOptions::default() };
    let methods_shape = options.shape(&shape, 32);
    let kinds: std::collections::BTreeSet<_> =
        options.methods.iter().flat_map(MethodSpec::artifacts).collect();
    for kind in kinds {
        let text = prompt(model);
        options.artifacts.insert(calibrate(model, kind, &methods_shape, &text, &mut |_, _, _| {}).unwrap());
    }
    DaemonKv::connect(&daemon.socket(), shape, options).unwrap()
}

fn read(kv: &mut DaemonKv, method: usize, model: &Arc<Model>) -> DaemonSequence {
    let mut sequence = kv.sequence(method).unwrap();
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    decoder.prefill(kv, &mut sequence, &prompt(model), PrefillOptions::default()).unwrap();
    kv.take_stats();
    sequence
}

/// Logits of steps with tokens that are the same for everybody.
fn steps(
    kv: &mut DaemonKv,
    batch: &mut [&mut DaemonSequence],
    model: &Arc<Model>,
    count: u32,
) -> Vec<Vec<f32>> {
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    (0..count)
        .map(|i| {
            let tokens: Vec<u32> = (0..batch.len() as u32).map(|member| (7 * i + member) % 50).collect();
            decoder.step(kv, batch, &tokens).unwrap().logits
        })
        .collect()
}

/// Means that a lane merges cross as f16, and sums over digests are cut where their memory is: thresholds differ in their last bits, and a row that
/// lies on one comes in here and not there. Then the step differs, and later ones may. Most must not.
fn assert_alike(what: &str, lane: &[Vec<f32>], client: &[Vec<f32>], most: f32, mostly: f32) {
    assert_eq!(lane.len(), client.len(), "{what}");
    let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let apart: Vec<f32> = lane.iter().zip(client).map(|(lane, client)| worst(lane, client)).collect();
    let mut sorted = apart.clone();
    sorted.sort_by(f32::total_cmp);
    assert!(sorted[sorted.len() - 1] < most && sorted[sorted.len() / 2] < mostly, "{what}: {apart:?}");
}

#[test]
fn a_client_selects_what_a_lane_selects() {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let mut selected = 0;
    for (at, name) in METHODS.into_iter().enumerate() {
        let [lane, client] = [Selects::Lane, Selects::Client].map(|selects| {
            let mut kv = connect(&daemon, &model, &[name], selects);
            let mut sequence = read(&mut kv, 0, &model);
            // Over the end of a page, so that one is digested on the way.
            let logits = steps(&mut kv, &mut [&mut sequence], &model, 40);
            (logits, kv.take_stats(), kv.selected_by(&sequence), sequence.digest_bytes())
        });
        let (most, mostly) = if at < EXACT { (1e-3, 1e-3) } else { (0.5, 5e-3) };
        assert_alike(name, &lane.0, &client.0, most, mostly);
        assert_eq!((lane.2, client.2), (SelectedBy::Lane, SelectedBy::Client), "{name}");
        let rows = [&lane, &client].map(|run| run.1.rows_selected as f64);
        assert!((rows[0] - rows[1]).abs() <= 0.02 * rows[0], "{name}: {rows:?}");
        let [by_lane, here] = [lane.1.certified, client.1.certified];
        assert_eq!(by_lane.heads, here.heads, "{name}");
        assert!(
            (by_lane.missed_mass - here.missed_mass).abs() <= 0.02 * by_lane.missed_mass,
            "{name}: {by_lane:?} {here:?}"
        );
        assert_eq!((lane.1.selected_here, client.1.answers), (0, 0), "{name}");
        assert!(lane.1.answers > 0 && client.1.selected_here > 0, "{name}: {:?}", client.1);
        assert_eq!((lane.3, client.3 > 0), (0, name != "window"), "{name}: {} bytes", client.3);
        selected += client.1.selected_here;
    }
    // The daemon's operator sees it, too.
    daemon.wait_for("no session", |status| status.totals.sessions == 0);
    assert_eq!(http::metric(&daemon, "kvoyant_selections_total{by=\"client\"}"), selected as f64);
}

#[test]
fn forks_truncations_and_batches_are_as_by_a_lane() {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    // Methods with the same digests, with others, and one that no client can.
    let methods = [
        "kvoyant:budget=24,tail=off",
        "kvoyant:budget=9,hint=ahead,tail=off",
        "quest:budget=64,hint=current",
        "oracle:budget=5%",
    ];
    let [lane, client] = [Selects::Lane, Selects::Client].map(|selects| {
        let mut kv = connect(&daemon, &model, &methods, selects);
        let mut parent = read(&mut kv, 0, &model);
        let mut all = steps(&mut kv, &mut [&mut parent], &model, 3);
        let mut forks: Vec<_> = (0..4).map(|method| kv.fork(&mut parent, Some(method)).unwrap()).collect();
        let by: Vec<_> = forks.iter().map(|fork| kv.selected_by(fork)).collect();
        let expected = if selects == Selects::Lane { SelectedBy::Lane } else { SelectedBy::Client };
        assert_eq!(by, [expected, expected, expected, SelectedBy::Lane]);
        let mut batch: Vec<&mut DaemonSequence> = forks.iter_mut().collect();
        all.extend(steps(&mut kv, &mut batch, &model, 33));
        // The parent goes on as if nothing had been, and after a cut within a page.
        all.extend(steps(&mut kv, &mut [&mut parent], &model, 3));
        kv.truncate(&mut parent, PROMPT - 41).unwrap();
        all.extend(steps(&mut kv, &mut [&mut parent], &model, 45));
        all
    });
    assert_eq!(lane.len(), client.len());
    assert_alike("all", &lane, &client, 1e-3, 1e-3);
}

#[test]
fn the_daemon_keeps_no_digests_of_what_a_client_selects_and_refuses_to_speculate_it() {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let mut kv = connect(&daemon, &model, &["kvoyant:budget=24", "resv:budget=5%"], Selects::Client);
    let mut sequence = read(&mut kv, 0, &model);
    steps(&mut kv, &mut [&mut sequence], &model, 2);
    let wait = || std::thread::sleep(Duration::from_millis(300));
    wait();
    assert_eq!(daemon.status().sessions[0].digest_bytes, 0);

    let shared = kv.model().clone();
    let own = shared.open_selected_by(0, 8, SelectedBy::Client).unwrap();
    let query = vec![0.5; model.config().query_heads * model.config().head_dim];
    let member = Member { sequence: &own, position: 0, hint: Hint::Query(&query) };
    for pending in [shared.speculate(2, &[member]), shared.rest(2, &[member])] {
        let answer = pending.unwrap().wait(Duration::from_secs(10));
        assert!(
            matches!(answer, Err(Error::NotReady { status: Status::SelectedByClient, .. })),
            "{answer:?}"
        );
    }
    // A fork that a lane selects for gets the digests that its parent has none of.
    let fork = own.fork_selected_by(None, SelectedBy::Lane).unwrap();
    let member = Member { sequence: &fork, position: 0, hint: Hint::Query(&query) };
    shared.speculate(2, &[member]).unwrap().wait(Duration::from_secs(10)).unwrap();
    // The session goes on.
    let next = steps(&mut kv, &mut [&mut sequence], &model, 1);
    assert!(next[0].iter().all(|logit| logit.is_finite()) && argmax(&next[0]) < 512);
}

#[test]
fn a_method_that_drops_rows_is_a_lanes_alone() {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let mut kv = connect(&daemon, &model, &["infinigen:pool=400"], Selects::Client);
    let sequence = kv.sequence(0).unwrap();
    assert_eq!(kv.selected_by(&sequence), SelectedBy::Lane);
    let refused = kv.model().open_selected_by(0, 8, SelectedBy::Client);
    assert!(
        matches!(&refused, Err(Error::Failed(Failure::BadMethod(why))) if why.contains("pool")),
        "{refused:?}"
    );
}

#[test]
fn a_method_that_divides_a_budget_among_heads_is_a_lanes_too() {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let mut kv = connect(&daemon, &model, &["kvoyant:budget=24,scope=layer"], Selects::Client);
    let mut sequence = read(&mut kv, 0, &model);
    assert_eq!(kv.selected_by(&sequence), SelectedBy::Lane);
    steps(&mut kv, &mut [&mut sequence], &model, 2);
    assert_eq!(kv.take_stats().selected_here, 0);
}

#[test]
fn a_query_that_is_no_number_is_refused_as_by_a_lane_and_the_sequence_goes_on() {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    for selects in [Selects::Lane, Selects::Client] {
        let mut kv = connect(&daemon, &model, &["kvoyant:budget=24"], selects);
        let mut sequence = read(&mut kv, 0, &model);
        let width = model.config().query_heads * model.config().head_dim;
        for bad in [f32::NAN, f32::INFINITY] {
            let mut queries = vec![0.1; width];
            queries[width - 1] = bad;
            let (mut batch, mut out) = ([&mut sequence], vec![0.0; width]);
            kv.begin_step(&mut batch, &[PROMPT]).unwrap();
            let refused = kv.attend(2, &mut batch, &[PROMPT], &queries, &mut out);
            let bad_hint =
                matches!(refused, Err(DaemonError::Client(Error::NotReady { status: Status::BadHint, .. })));
            assert!(bad_hint, "{selects:?}, {bad}: {refused:?}");
        }
        let next = steps(&mut kv, &mut [&mut sequence], &model, 1);
        assert!(next[0].iter().all(|logit| logit.is_finite()));
    }
}
