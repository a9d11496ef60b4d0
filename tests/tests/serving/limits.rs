//! What does not fit, and what cannot be: a typed refusal of the request, and a session that goes on as if nothing had been asked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvoyant_client::{Client, Error, Hint, Limits, Member, Model, Options, Sequence, Status};
use kvoyant_kernels::Dtype;
use kvoyant_methods::{Artifact, ArtifactKind, Fingerprint, Tensor, TensorArtifact};
use kvoyant_protocol::control::{Failure, ModelSpec, SelectedBy, ToClient, ToDaemon, decode, features};
use kvoyant_protocol::layout::{c2d, d2c};
use kvoyant_protocol::wire::{Append, BatchEntry, Operation, Request, Speculate, Stat};
use kvoyant_tests::noisy::{QUERY, noise, noisy};
use kvoyant_tests::raw::{self, Raw};
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

/// A session whose answers may have so many bytes.
fn connect(daemon: &Daemon, table_bytes: u32, methods: &[&str]) -> Model {
    let limits = Limits { table_bytes, ..Limits::default() };
    let client = Client::connect(&daemon.socket(), Options { limits, ..Options::default() }).unwrap();
    client.register(fake::spec(methods), &[]).unwrap()
}

fn is_table_full<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::NotReady { status: Status::TableFull, .. }))
}

#[test]
fn a_batch_whose_block_table_does_not_fit_is_refused_and_its_parts_are_answered() {
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        // Half of 300 rows at random are some 75 runs of 12 bytes for each of two heads.
        let model = connect(&daemon, 4096, &["random:budget=50%"]);
        let sequences: Vec<Sequence> = (0..4)
            .map(|seed| {
                let sequence = model.open(0, 300).unwrap();
                fake::fill(&model, &sequence, seed, 300).unwrap();
                sequence
            })
            .collect();
        for _ in 0..20 {
            let members: Vec<_> = sequences
                .iter()
                .map(|sequence| Member { sequence, position: 300, hint: Hint::None })
                .collect();
            let all = model.speculate(1, &members).unwrap().wait(PATIENCE);
            assert!(is_table_full(&all), "{:?}", all.map(|ready| *ready.completion()));
            // Whatever the refused answer had begun to bring, each part names rows that are there.
            for (seed, sequence) in sequences.iter().enumerate() {
                let ready = fake::ask(&model, sequence, 1);
                assert!(fake::check(&ready, 0, seed, 1).unwrap() > 0);
            }
        }
    }
}

#[test]
fn partial_attentions_of_a_batch_are_refused_where_its_table_would_not_hold_them() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = connect(&daemon, 4096, &["scout:budget=100%,query=true"]);
    // 4 query heads of 32 values and an lse, a count, and the entries of two KV heads.
    let of_one = 4 * (1 + fake::QUERY_HEADS * (1 + fake::HEAD_DIM)) + fake::KV_HEADS * 16;
    let most = 4096 / of_one;
    let empty: Vec<Sequence> = (0..=most).map(|_| model.open(0, 0).unwrap()).collect();
    let query = noise(QUERY, 3);
    let ask = |sequences: &[Sequence]| {
        let member = |sequence| Member { sequence, position: sequence.tokens(), hint: Hint::Query(&query) };
        let members: Vec<_> = sequences.iter().map(member).collect();
        model.speculate(1, &members).unwrap().wait(PATIENCE)
    };
    for _ in 0..3 {
        // Room is asked for before any row is attended, so that what a batch may have does not depend on what it finds.
        assert!(is_table_full(&ask(&empty)));
        let ready = ask(&empty[..most]).unwrap();
        assert!((0..most).all(|member| ready.rows(member, 0) == 0 && ready.partial(member).is_none()));
    }
    let sequences: Vec<Sequence> = (0..most).map(|_| noisy(&model, 100)).collect();
    let ready = ask(&sequences).unwrap();
    for member in 0..most {
        let partial = ready.partial(member).unwrap();
        assert_eq!(partial.rows as usize, fake::KV_HEADS * (101 - fake::SINKS - fake::WINDOW));
        assert!(partial.lse.iter().chain(partial.out).all(|value| value.is_finite()));
        // They hold the same rows, and so does what was attended over them.
        assert_eq!(partial.out, ready.partial(0).unwrap().out);
    }
}

#[test]
fn an_unknown_method_an_artifact_of_another_model_a_budget_of_nothing_and_a_hint_of_nan_leave_their_session_as_it_was()
 {
    let daemon = Daemon::start(DAEMON, &[]);
    let neighbour = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = neighbour.open(0, 200).unwrap();
    fake::fill(&neighbour, &sequence, 9, 200).unwrap();
    let mut raw = Raw::greet(&daemon.socket(), features::COMMON);
    let of_model = |byte| {
        let tensor = Tensor { shape: vec![2], values: vec![1.0, 2.0] };
        let tensors = [("conv1.bias".to_owned(), tensor)].into_iter().collect();
        let fingerprint = Fingerprint([byte; 16]);
        let artifact =
            TensorArtifact::new(ArtifactKind::Predictor, fingerprint, tensors, Default::default()).unwrap();
        Artifact::Tensors(std::sync::Arc::new(artifact)).to_bytes().unwrap()
    };
    let trained = "attention-predictor:weights=trained";
    for (method, artifacts, reason) in [
        ("clairvoyance", vec![], "unknown method `clairvoyance`"),
        (trained, vec![of_model(7)], "0707"),
        (trained, vec![], "predictor"),
        ("quest:budget=0", vec![], "budget 0"),
        ("quest:budget=0%", vec![], "budget 0%"),
        ("mix:rest=(quest:budget=0)", vec![], "budget 0"),
    ] {
        let answer = raw.register(fake::spec(&["full", method]), &artifacts).unwrap();
        let answer: ToClient = decode(&answer.bytes).unwrap();
        let ToClient::Failed(Failure::BadMethod(said)) = answer else { panic!("{method}: {answer:?}") };
        assert!(said.contains(reason), "{method}: {said}");
    }
    let registered = raw.register(fake::spec(&["quest:budget=20,hint=current"]), &[]).unwrap();
    let registered: ToClient = decode(&registered.bytes).unwrap();
    assert!(matches!(registered, ToClient::Registered { .. }), "{registered:?}");
    let id = raw.open(100);
    let append =
        Request { release_through: 0, operation: Operation::Append(Append { layer: None, batch: 1 }) };
    raw.push(&append, &[BatchEntry { sequence: id, position: 0, value: 100 }]);
    let mut ticket = 0;
    let mut ask = |raw: &mut Raw, query: &[f32]| {
        let bytes: Vec<u8> = query.iter().flat_map(|value| value.to_le_bytes()).collect();
        raw.c2d.write(raw.layout.hints(raw.tail), &bytes).unwrap();
        let speculate = Speculate { hint_bytes: bytes.len() as u32, ..raw::speculate(ticket + 1) };
        let request = Request { release_through: ticket, operation: Operation::Speculate(speculate) };
        raw.push(&request, &[BatchEntry { sequence: id, position: 100, value: 0 }]);
        ticket += 1;
        raw.wait_for_ticket(ticket);
        raw.c2d.store_u32(c2d::COMPLETION_HEAD, ticket as u32);
        (raw.d2c.load_u64(d2c::TIMELINE) & 0xff) as u8
    };
    let good = noise(QUERY, 1);
    assert_eq!(ask(&mut raw, &good), Status::Ready as u8);
    for (at, bad) in [(0, f32::NAN), (QUERY / 2, -f32::NAN), (QUERY - 1, f32::NAN), (7, f32::INFINITY)] {
        let mut query = good.clone();
        query[at] = bad;
        assert_eq!(ask(&mut raw, &query), Status::BadHint as u8, "{bad} at {at}");
        assert_eq!(ask(&mut raw, &good), Status::Ready as u8);
    }
    fake::check(&fake::ask(&neighbour, &sequence, 1), 0, 9, 1).unwrap();
}

#[test]
fn a_position_beyond_what_was_appended_is_refused_though_its_page_has_no_digest_yet() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["kvoyant:budget=10%"]);
    let sequence = model.open(0, 128).unwrap();
    // Of page 1, rows 32 to 63, all but four are there; candidates of position 75 end with them.
    fake::fill(&model, &sequence, 1, 60).unwrap();
    let query = vec![0.5; fake::QUERY_HEADS * fake::HEAD_DIM];
    let ask = |position: usize| {
        let member = Member { sequence: &sequence, position, hint: Hint::Query(&query) };
        model.speculate(1, &[member]).unwrap().wait(PATIENCE)
    };
    let early = ask(75);
    assert!(matches!(early, Err(Error::NotReady { status: Status::NotAppended, .. })), "{early:?}");
    assert!(ask(60).is_ok(), "the session goes on");
}

/// A model whose rows are as small as can be, so that there are many of them.
fn small(methods: &[&str]) -> ModelSpec {
    ModelSpec {
        layers: 1,
        query_heads: 1,
        kv_heads: 1,
        head_dim: 4,
        dtype: Dtype::F16.code(),
        dense_layers: 0,
        ..fake::spec(methods)
    }
}

#[test]
fn rows_that_take_long_to_digest_hold_up_their_own_session_and_nobody_else() {
    const MANY: u32 = 60_000;
    let daemon = Daemon::start(DAEMON, &["--lanes", "1", "--in-place", "true"]);
    let neighbour = fake::connect(&daemon, &["full"]);
    let kept = neighbour.open(0, 200).unwrap();
    fake::fill(&neighbour, &kept, 9, 200).unwrap();
    let ask = || {
        let member = Member { sequence: &kept, position: 200, hint: Hint::None };
        let ready = neighbour.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap();
        assert!(fake::check(&ready, 0, 9, 1).unwrap() > 0);
    };
    // Each row is compared with the 4,096 before it.
    let mut raw = Raw::connect(&daemon.socket(), small(&["full", "resv:recent=4096"]));
    let append =
        Request { release_through: 0, operation: Operation::Append(Append { layer: None, batch: 1 }) };
    let rows = |sequence| BatchEntry { sequence, position: 0, value: MANY };
    let open = ToDaemon::Open { method: 1, tokens: MANY, by: SelectedBy::Lane };
    let ToClient::Opened { sequence, .. } = raw.call(&open).unwrap() else { panic!("no sequence") };
    raw.push(&append, &[rows(sequence)]);
    // A query of four zeros.
    let speculate = Speculate { layer: 0, hint_bytes: 16, ..raw::speculate(1) };
    raw.push(
        &Request { release_through: 0, operation: Operation::Speculate(speculate) },
        &[BatchEntry { sequence, position: MANY - 1, value: 0 }],
    );
    let appended = || raw.d2c.load_u64(d2c::STATS + Stat::RowsAppended as usize * 8);
    wait_until("the rows are there", || appended() == u64::from(MANY));
    ask();
    assert_eq!(raw.timeline(), 0, "its own answer comes after the digests");
    raw.wait_for_ticket(1);
    // So does a fork to a method that has digested nothing yet.
    let open = ToDaemon::Open { method: 0, tokens: MANY, by: SelectedBy::Lane };
    let ToClient::Opened { sequence, .. } = raw.call(&open).unwrap() else { panic!("no sequence") };
    raw.push(&append, &[rows(sequence)]);
    wait_until("the rows are there", || {
        raw.d2c.load_u64(d2c::STATS + Stat::RowsAppended as usize * 8) == 2 * u64::from(MANY)
    });
    let forked = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let fork = ToDaemon::Fork { parent: sequence, method: Some(1), by: SelectedBy::Lane };
            let answer = raw.call(&fork).unwrap();
            forked.store(true, Ordering::Relaxed);
            assert!(matches!(answer, ToClient::Opened { .. }), "{answer:?}");
        });
        std::thread::sleep(Duration::from_millis(20));
        ask();
        assert!(!forked.load(Ordering::Relaxed), "it waits for the digests");
    });
}
