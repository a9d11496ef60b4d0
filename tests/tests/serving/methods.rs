//! What methods may ask for, through a real daemon: queries of every source, ids, feedback, marks, rows ahead of a step,
//! attention on the CPU, and rows in every format.

use std::time::Duration;

use kvoyant_client::{
    Client, Dtype, Error, Failure, Format, Hint, Member, Model, ModelSpec, Options, Ready, RowLayout,
    Sequence, Status,
};
use kvoyant_protocol::control::ToClient;
use kvoyant_protocol::wire::{Append, BatchEntry, FeedbackRows, Operation, Stat};
use kvoyant_tests::noisy::{QUERY, append_noise, ask, noise, noisy, of_token, tokens_of};
use kvoyant_tests::raw::{self, Raw};
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const GROUP: usize = fake::QUERY_HEADS / fake::KV_HEADS;

fn connect(daemon: &Daemon, spec: ModelSpec) -> Result<Model, Error> {
    Client::connect(&daemon.socket(), Options::default()).unwrap().register(spec, &[])
}

fn refusal(daemon: &Daemon, spec: ModelSpec, artifacts: &[Vec<u8>]) -> String {
    let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
    client.register(spec, artifacts).unwrap_err().to_string()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn is_bad_hint(result: &Result<Ready, Error>) -> bool {
    matches!(result, Err(Error::NotReady { status: Status::BadHint, .. }))
}

#[test]
fn given_rows_are_exactly_those_asked_for_and_impossible_ones_fail_their_request_alone() {
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        let model = fake::connect(&daemon, &["given"]);
        let sequence = model.open(0, 300).unwrap();
        fake::fill(&model, &sequence, 3, 300).unwrap();
        let asked: [(&[u32], [&[usize]; 2]); 2] =
            [(&[3, 9, 200, 9, 1, 50], [&[9, 200], &[50]]), (&[0, 2, 7, 9], [&[], &[7, 9]])];
        for (ids, wanted) in asked {
            let ready = ask(&model, &sequence, 1, Hint::Ids(ids)).unwrap();
            assert_eq!([tokens_of(&ready, 0), tokens_of(&ready, 1)], wanted.map(<[usize]>::to_vec));
        }
        let ready = ask(&model, &sequence, 1, Hint::Ids(&[2, 40, 41, 1, 60])).unwrap();
        assert_eq!(fake::check(&ready, 0, 3, 1).unwrap(), 3);
        drop(ready);
        let beyond = &[1, 300, 0][..];
        let too_many = &[u32::MAX, 5, 0][..];
        let short = &[2, 5, 6][..];
        for bad in [beyond, &[1, u32::MAX, 1, 5]] {
            assert!(is_bad_hint(&ask(&model, &sequence, 1, Hint::Ids(bad))), "{bad:?}");
        }
        for bad in [too_many, short, &[]] {
            let refused = ask(&model, &sequence, 1, Hint::Ids(bad));
            assert!(matches!(refused, Err(Error::Size { wanted: 2, .. })), "{bad:?}: {refused:?}");
        }
        assert_eq!(tokens_of(&ask(&model, &sequence, 1, Hint::Ids(&[0, 1, 5])).unwrap(), 1), [5]);
    }
}

#[test]
fn every_source_of_queries_is_served_and_a_query_that_is_no_number_fails_its_request_alone() {
    let daemon = Daemon::start(DAEMON, &[]);
    for method in ["quest:hint=previous", "quest:hint=current", "oracle:hint=ahead", "louver", "resv"] {
        let model = fake::connect(&daemon, &[method]);
        let sequence = noisy(&model, 300);
        let good = noise(QUERY, 5);
        let selected = |ready: &Ready| tokens_of(ready, 0);
        let first = selected(&ask(&model, &sequence, 1, Hint::Query(&good)).unwrap());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut query = good.clone();
            query[QUERY - 1] = bad;
            assert!(is_bad_hint(&ask(&model, &sequence, 1, Hint::Query(&query))), "{method}");
        }
        assert!(ask(&model, &sequence, 1, Hint::Query(&good[1..])).is_err(), "the client refuses its length");
        let again = selected(&ask(&model, &sequence, 1, Hint::Query(&good)).unwrap());
        assert_eq!(first, again, "{method}: no request that failed leaves anything behind");
    }
}

#[test]
fn a_block_of_queries_selects_for_all_of_its_tokens() {
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        let model = fake::connect(&daemon, &["oracle:budget=4"]);
        let sequence = noisy(&model, 300);
        // Each query token looks for the key of one token.
        let wanted = [20, 90, 150, 222];
        let hint: Vec<f32> = wanted
            .iter()
            .flat_map(|token| {
                let (keys, _) = of_token(model.layout(), fake::KV_HEADS, 1, *token);
                let head = |head: usize| keys[head / GROUP * fake::HEAD_DIM..][..fake::HEAD_DIM].to_vec();
                (0..fake::QUERY_HEADS).flat_map(head).map(|value| value * 50.0).collect::<Vec<_>>()
            })
            .collect();
        let member = Member { sequence: &sequence, position: 300, hint: Hint::Query(&hint) };
        let ready = model.speculate_block(1, &[member], wanted.len()).unwrap().wait(PATIENCE).unwrap();
        assert_eq!((tokens_of(&ready, 0), tokens_of(&ready, 1)), (wanted.to_vec(), wanted.to_vec()));
        assert!(model.speculate_block(1, &[member], 3).is_err(), "a hint of another length");
    }
}

#[test]
fn rows_come_ahead_of_a_step_and_no_answer_names_one_that_is_not_there_yet() {
    // Slow copies by several threads, so that they pass one another; slots keep what was in them before.
    let flags = ["--shape-latency-us", "3000", "--copy-threads", "3", "--keep", "1.5"];
    let daemon = Daemon::start(DAEMON, &flags);
    let model = fake::connect(&daemon, &["freekv:budget=20%,tau=-1"]);
    let sequence = model.open(0, 600).unwrap();
    fake::fill(&model, &sequence, 1, 500).unwrap();
    for step in 0..40 {
        for layer in 1..fake::LAYERS {
            let query: Vec<f32> = noise(QUERY, step * 10 + layer).iter().map(|value| value * 1e-6).collect();
            let ready = ask(&model, &sequence, layer, Hint::Query(&query)).unwrap();
            assert!(fake::check(&ready, 0, 1, layer).unwrap() > 0);
        }
        let tokens = sequence.tokens();
        fake::fill(&model, &sequence, 1, tokens + 1).unwrap();
        if step == 20 {
            // What is still on its way to rows that are cut must not arrive in others' slots.
            sequence.truncate(400).unwrap();
            model.reserve(&[(&sequence, 600)]).unwrap();
        }
    }
    // Some may be on their way yet: counters agree once they are there.
    let row_bytes = 2 * fake::HEAD_DIM as u64 * 4;
    wait_until("rows ahead of a step, counted alike everywhere", || {
        let rows = model.stat(Stat::PrefetchedRows);
        rows > 0
            && model.stat(Stat::PrefetchBytes) == rows * row_bytes
            && daemon.status().sessions[0].prefetched_rows == rows
    });
}

#[test]
fn rows_that_a_truncation_has_brought_into_the_window_are_named_no_more_although_they_are_there() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["kvoyant:budget=100%"]);
    let sequence = noisy(&model, 300);
    let query = noise(QUERY, 3);
    let named = |tokens: usize| -> Vec<usize> {
        let ready = ask(&model, &sequence, 1, Hint::Query(&query)).unwrap();
        assert_eq!(sequence.tokens(), tokens);
        (0..fake::KV_HEADS).flat_map(|head| tokens_of(&ready, head)).collect()
    };
    assert!(named(300).contains(&(300 - fake::WINDOW)));
    // With it goes what was read before.
    append_noise(&model, &sequence, 301);
    sequence.truncate(290).unwrap();
    let named = named(290);
    let most = named.iter().max().copied();
    assert!(
        most.is_some_and(|most| most < 291 - fake::WINDOW),
        "{most:?} is in the window, and attended with it"
    );
}

#[test]
fn what_a_lane_takes_for_others_is_time_that_a_request_waits() {
    let daemon = Daemon::start(DAEMON, &["--lanes", "1"]);
    let (busy, other) =
        (fake::connect(&daemon, &["oracle:budget=5%"]), fake::connect(&daemon, &["random:budget=7"]));
    let (long, short) = (noisy(&busy, 3000), noisy(&other, 100));
    let query = noise(QUERY, 1);
    let member = Member { sequence: &long, position: 3000, hint: Hint::Query(&query) };
    let waited = (0..20).any(|_| {
        let first = busy.speculate(1, &[member; 16]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        let second = Member { sequence: &short, position: 100, hint: Hint::None };
        let second = other.speculate(1, &[second]).unwrap();
        let (first, second) = (first.wait(PATIENCE).unwrap(), second.wait(PATIENCE).unwrap());
        let (selecting, waiting) = (first.completion().select_ns, second.completion().queue_ns);
        selecting > 4_000_000 && waiting > selecting / 3
    });
    assert!(waited, "a request behind one of many milliseconds never waited");
}

#[test]
fn in_place_nothing_is_brought_ahead() {
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let model = fake::connect(&daemon, &["freekv:budget=20%,tau=-1"]);
    let sequence = noisy(&model, 300);
    for step in 0..3 {
        drop(ask(&model, &sequence, 1, Hint::Query(&noise(QUERY, step))).unwrap());
    }
    assert_eq!(model.stat(Stat::PrefetchedRows), 0);
}

/// Dense attention of one query over rows with these indices, and its lse, in f64.
fn dense(query: &[f32], rows: &[(Vec<f32>, Vec<f32>)]) -> (Vec<f64>, f64) {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let score =
        |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale;
    let scores: Vec<f64> = rows.iter().map(|(key, _)| score(key)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if rows.is_empty() {
        return (vec![0.0; query.len()], max);
    }
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    let mut out = vec![0.0; rows[0].1.len()];
    for ((_, value), score) in rows.iter().zip(&scores) {
        let weight = (score - max).exp() / sum;
        out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * f64::from(*value));
    }
    (out, max + sum.ln())
}

#[test]
fn what_the_cpu_attends_and_what_is_resident_merge_to_attention_over_the_selection() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["scout:budget=100%,query=true"]);
    let layout = model.layout();
    let sequence = noisy(&model, 200);
    let d = fake::HEAD_DIM;
    let mut shares = Vec::new();
    for step in 0..4 {
        let tokens = sequence.tokens();
        let query: Vec<f32> = noise(QUERY, 77 + step).iter().map(|value| value * 4.0).collect();
        let ready = ask(&model, &sequence, 1, Hint::Query(&query)).unwrap();
        let partial = ready.partial(0);
        shares
            .push((partial.map_or(0, |partial| partial.rows as usize), ready.rows(0, 0) + ready.rows(0, 1)));
        for head in 0..fake::KV_HEADS {
            let mut bytes = Vec::new();
            ready.copy_rows(0, head, &mut bytes).unwrap();
            let resident = floats(&bytes);
            let resident: Vec<_> =
                resident.chunks(2 * d).map(|row| (row[..d].to_vec(), row[d..].to_vec())).collect();
            let selected = fake::SINKS..tokens + 1 - fake::WINDOW;
            let rows: Vec<_> = selected
                .map(|token| {
                    let (key, value) = of_token(layout, fake::KV_HEADS, 1, token);
                    (key[head * d..][..d].to_vec(), value[head * d..][..d].to_vec())
                })
                .collect();
            for member in 0..GROUP {
                let at = head * GROUP + member;
                let query = &query[at * d..][..d];
                let (wanted, wanted_lse) = dense(query, &rows);
                let (mut out, mut lse) = dense(query, &resident);
                if let Some(partial) = partial {
                    let (o, l) = (&partial.out[at * d..][..d], f64::from(partial.lse[at]));
                    let both = (lse.exp() + l.exp()).ln();
                    for (out, o) in out.iter_mut().zip(o) {
                        *out = *out * (lse - both).exp() + f64::from(*o) * (l - both).exp();
                    }
                    lse = both;
                }
                assert!((lse - wanted_lse).abs() < 1e-4, "step {step}: {lse} for {wanted_lse}");
                for (found, wanted) in out.iter().zip(&wanted) {
                    assert!((found - wanted).abs() < 1e-4, "step {step}: {found} for {wanted}");
                }
            }
        }
        drop(ready);
        if step == 1 {
            // Some are there now, and some are not.
            append_noise(&model, &sequence, 260);
        }
    }
    let [first, second, third, fourth] = shares[..] else { panic!("{shares:?}") };
    assert!(first.0 > 0 && first.1 == 0, "nothing is there at first: {shares:?}");
    assert!(second.0 == 0 && second.1 == first.0, "and all of it for the next step: {shares:?}");
    assert!(third.0 > 0 && third.1 > 0, "{shares:?}");
    assert!(fourth.0 == 0, "{shares:?}");
    assert_eq!(model.stat(Stat::CpuRows) as usize, first.0 + third.0);
    assert_eq!(model.stat(Stat::BytesMoved), 0, "no answer waits for a copy");
    assert_eq!(model.stat(Stat::PrefetchedRows) as usize, first.0 + third.0);
}

#[test]
fn a_method_that_rebuilds_keys_moves_values_alone() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["shadowkv:budget=20%,rank=8"]);
    let sequence = model.open(0, 400).unwrap();
    fake::fill(&model, &sequence, 2, 400).unwrap();
    let query: Vec<f32> = noise(QUERY, 1).iter().map(|value| value * 1e-6).collect();
    let ready = ask(&model, &sequence, 1, Hint::Query(&query)).unwrap();
    let rows = u64::from(ready.completion().rows_selected);
    assert!(rows > 0);
    assert_eq!(ready.completion().bytes_moved, rows * fake::HEAD_DIM as u64 * 4);
    for head in 0..fake::KV_HEADS {
        let mut bytes = Vec::new();
        ready.copy_rows(0, head, &mut bytes).unwrap();
        let rows = floats(&bytes);
        for (row, token) in rows.chunks(2 * fake::HEAD_DIM).zip(tokens_of(&ready, head)) {
            assert_eq!(row[fake::HEAD_DIM..], fake::row(2, 1, head, token)[fake::HEAD_DIM..]);
        }
    }
}

#[test]
fn rows_of_every_format_come_back_as_their_format_keeps_them() {
    let latent = |format, dim, value| (RowLayout::Latent { dim, value, format }, 1);
    let pairs = |format| (RowLayout::KeyValue { d: fake::HEAD_DIM, format }, fake::KV_HEADS);
    let mut layouts: Vec<_> = Format::ALL.into_iter().map(pairs).collect();
    layouts.extend([latent(Format::Plain(Dtype::F16), 96, 64), latent(Format::Int8, 96, 64)]);
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        for &(layout, kv_heads) in &layouts {
            let spec = ModelSpec {
                dtype: layout.format().code(),
                head_dim: layout.key_values() as u32,
                kv_heads: kv_heads as u32,
                latent_values: match layout {
                    RowLayout::KeyValue { .. } => 0,
                    RowLayout::Latent { value, .. } => value as u32,
                },
                sinks: 0,
                ..fake::spec(&["given", "oracle:budget=3"])
            };
            if layout.row_bytes().is_none() {
                assert!(refusal(&daemon, spec, &[]).contains("there are no rows"), "{layout}");
                continue;
            }
            let model = connect(&daemon, spec).unwrap();
            assert_eq!(model.layout(), layout);
            let sequence = noisy(&model, 150);
            let ids: Vec<u32> = (0..kv_heads).flat_map(|head| [2, head as u32, 77]).collect();
            let ready = ask(&model, &sequence, 1, Hint::Ids(&ids)).unwrap();
            let (d, v) = (layout.key_values(), layout.value_values());
            for head in 0..kv_heads {
                let mut bytes = Vec::new();
                ready.copy_rows(0, head, &mut bytes).unwrap();
                let (mut keys, mut values) = (vec![0.0; 2 * d], vec![0.0; 2 * v]);
                layout.decode_keys(&bytes, &mut keys);
                layout.decode_values(&bytes, &mut values);
                for (at, token) in [head, 77].into_iter().enumerate() {
                    let (key, value) = of_token(layout, kv_heads, 1, token);
                    let key = &key[head * d..][..d];
                    let value = if value.is_empty() { &key[..v] } else { &value[head * v..][..v] };
                    let error = match layout.format() {
                        Format::Plain(Dtype::F32) => 0.0,
                        Format::Plain(_) | Format::Int8 => 1.0 / 100.0,
                        _ => 1.0 / 7.0,
                    };
                    let found = keys[at * d..][..d].iter().chain(&values[at * v..][..v]);
                    for (found, wanted) in found.zip(key.iter().chain(value)) {
                        assert!((found - wanted).abs() <= error, "{layout}: {found} for {wanted}");
                    }
                    let (mut own_key, mut own_value) = (vec![0.0; d], vec![0.0; v]);
                    sequence.read(1, head, token..token + 1, &mut own_key, &mut own_value).unwrap();
                    assert_eq!(
                        (&own_key[..], &own_value[..]),
                        (&keys[at * d..][..d], &values[at * v..][..v])
                    );
                }
            }
            let moved = ready.completion().bytes_moved;
            let wanted = 2 * kv_heads * layout.row_bytes().unwrap();
            assert!(moved == 0 || moved == wanted as u64, "the small bytes travel: {moved} of {wanted}");
            drop(ready);
            // The daemon scores the rows in their format.
            let fork = sequence.fork(Some(1)).unwrap();
            let (key, _) = of_token(layout, kv_heads, 1, 40);
            let group = fake::QUERY_HEADS / kv_heads;
            let query: Vec<f32> = (0..fake::QUERY_HEADS)
                .flat_map(|head| {
                    key[head / group * d..][..d].iter().map(|value| value * 20.0).collect::<Vec<_>>()
                })
                .collect();
            let best = ask(&model, &fork, 1, Hint::Query(&query)).unwrap();
            assert!((0..kv_heads).all(|head| tokens_of(&best, head).contains(&40)), "{layout}");
        }
    }
    let daemon = Daemon::start(DAEMON, &[]);
    let two = ModelSpec { latent_values: 16, ..fake::spec(&["full"]) };
    assert!(refusal(&daemon, two, &[]).contains("1 KV head"));
    let scout = ModelSpec { latent_values: 16, kv_heads: 1, ..fake::spec(&["scout"]) };
    assert!(refusal(&daemon, scout, &[]).contains("a value of their own"));
}

#[test]
fn the_daemon_selects_what_its_methods_select_in_plain_memory_marks_forks_and_truncations_included() {
    use kvoyant_methods::{Artifacts, Replay, Scratch, Shape};
    let mark = |token: usize| [0, 1, 0, 3, 2][token % 5];
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let methods = ["dynsplit:budget=64", "freekv:tau=2", "shadowkv:rank=8", "quest", "resv", "oracle"];
    for method in methods {
        let model = fake::connect(&daemon, &[method]);
        let spec = model.spec();
        let shape = Shape {
            layers: fake::LAYERS,
            query_heads: fake::QUERY_HEADS,
            kv_heads: fake::KV_HEADS,
            head_dim: fake::HEAD_DIM,
            value_dim: fake::HEAD_DIM,
            page_rows: model.page_rows(),
            sinks: fake::SINKS,
            window: fake::WINDOW,
            dense_layers: 1,
            dtype: Dtype::F32,
            fingerprint: spec.fingerprint.parse().unwrap(),
        };
        let built = kvoyant_methods::build(&method.parse().unwrap(), &shape, &Artifacts::none()).unwrap();
        let mut replay = Replay::new(&*built, &shape, 1, 512);
        let (query, mut scratch) = (noise(QUERY, 9), Scratch::new());
        let extend = |sequence: &Sequence, replay: &mut Replay, tokens: usize| {
            let range = replay.tokens()..tokens;
            let marks: Vec<u8> = range.clone().map(mark).collect();
            model.reserve(&[(sequence, tokens)]).unwrap();
            model.mark(sequence, range.start, &marks).unwrap();
            append_noise(&model, sequence, tokens);
            replay.mark(&marks);
            let keys: Vec<f32> =
                range.flat_map(|token| of_token(model.layout(), fake::KV_HEADS, 1, token).0).collect();
            replay.append(&*built, &keys, usize::MAX);
        };
        let mut check = |sequence: &Sequence, replay: &mut Replay, what: &str| {
            let member = Member { sequence, position: replay.tokens() - 1, hint: Hint::Query(&query) };
            let ready = model.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap();
            let wanted = replay.select(&*built, &query, &mut scratch);
            for head in 0..fake::KV_HEADS {
                let ranges = wanted.head(head).iter();
                let wanted: Vec<_> =
                    ranges.flat_map(|range| range.first as usize..range.end() as usize).collect();
                assert_eq!(tokens_of(&ready, head), wanted, "{method} {what}");
            }
        };
        let sequence = model.open(0, 0).unwrap();
        extend(&sequence, &mut replay, 300);
        check(&sequence, &mut replay, "after a prompt");
        let fork = sequence.fork(None).unwrap();
        let mut of_fork = replay.clone();
        extend(&sequence, &mut replay, 450);
        check(&sequence, &mut replay, "longer");
        sequence.truncate(170).unwrap();
        replay.truncate(&*built, 170);
        check(&sequence, &mut replay, "cut");
        extend(&sequence, &mut replay, 260);
        check(&sequence, &mut replay, "cut and grown");
        check(&fork, &mut of_fork, "forked");
        extend(&fork, &mut of_fork, 333);
        check(&fork, &mut of_fork, "forked and grown");
    }
}

#[test]
fn attention_rows_reach_the_method_and_impossible_ones_end_the_session_with_the_reason() {
    let daemon = Daemon::start(DAEMON, &[]);
    let method = ["attention-predictor:budget=64,weights=average", "full"];
    let model = fake::connect(&daemon, &method);
    let sequence = noisy(&model, 300);
    let blocks = 301usize.div_ceil(16);
    let hot = |block: usize| {
        let row = |_| (0..blocks).map(move |at| if at == block { 1.0 } else { 0.0 });
        (0..fake::KV_HEADS).flat_map(row).collect::<Vec<f32>>()
    };
    for _ in 0..70 {
        model.feedback(&sequence, 1, 301, true, &hot(7)).unwrap();
    }
    let ready = ask(&model, &sequence, 1, Hint::None).unwrap();
    let selected = tokens_of(&ready, 0);
    assert!((7 * 16..8 * 16).all(|token| selected.contains(&token)), "{selected:?}");
    drop(ready);
    // What cannot be is the caller's mistake, and nothing has happened.
    let silent = [0.0; 2];
    let other = sequence.fork(Some(1)).unwrap();
    model.reserve(&[(&sequence, 310)]).unwrap();
    for (mistake, refused) in [
        ("not within", model.feedback(&sequence, 1, 16, false, &[2.0, 0.0])),
        ("not within", model.feedback(&sequence, 1, 16, false, &[0.0, f32::NAN])),
        ("blocks", model.feedback(&sequence, 1, 160, false, &silent)),
        ("beyond the 320 tokens", model.feedback(&sequence, 1, 10_000, false, &[0.0; 1250])),
        ("attended whole", model.feedback(&sequence, 0, 16, false, &silent)),
        ("learns from no", model.feedback(&other, 1, 16, false, &silent)),
        ("a mark has 5", model.mark(&sequence, 300, &[5])),
        ("is marked has 10", model.mark(&sequence, 10, &[1, 2])),
    ] {
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(mistake), "{refused}");
    }
    drop(ask(&model, &sequence, 1, Hint::None).unwrap());
    // From whoever does not look before they tell, it ends the session.
    let feedback = |layer, values: usize| {
        Operation::Feedback(FeedbackRows { layer, payload_bytes: values as u32 * 4, full: false })
    };
    let zeros = [0_u8; 5_000];
    let two: Vec<u8> = [2.0_f32, 0.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let no_number: Vec<u8> = [0.0_f32, f32::NAN].iter().flat_map(|value| value.to_le_bytes()).collect();
    type Attack<'a> = (&'a str, &'a str, Operation, (u32, u32), &'a [u8]);
    let attacks: [Attack<'_>; 7] = [
        ("a weight above one", "not within 0..=1", feedback(1, 2), (16, 0), &two),
        ("a weight that is no number", "not within 0..=1", feedback(1, 2), (16, 0), &no_number),
        ("blocks that do not fit", "bytes", feedback(1, 2), (160, 0), &zeros[..8]),
        ("tokens that cannot be", "room", feedback(1, 1250), (10_000, 0), &zeros),
        ("a dense layer", "layer 0", feedback(0, 2), (16, 0), &zeros[..8]),
        ("a mark that is none", "the largest is", Operation::Mark { payload_bytes: 1 }, (300, 1), &[5]),
        (
            "marks of what is there",
            "marks or feedback",
            Operation::Mark { payload_bytes: 2 },
            (10, 2),
            &[1, 2],
        ),
    ];
    for (attack, reason, operation, (position, value), payload) in attacks {
        let mut raw = Raw::connect(&daemon.socket(), fake::spec(&method));
        let id = raw.open(310);
        let entry = |position, value| BatchEntry { sequence: id, position, value };
        let append = Operation::Append(Append { layer: None, batch: 1 });
        raw.push(&raw::request(append), &[entry(0, 300)]);
        raw.push_with(&raw::request(operation), &[entry(position, value)], payload);
        match raw.hear() {
            Ok(ToClient::Failed(Failure::Protocol(said))) => {
                assert!(said.contains(reason), "{attack}: {said}");
            }
            other => panic!("{attack}: {other:?}"),
        }
    }
    // Marks that are what they should be travel with the sequence, whatever its method makes of them.
    let marked = fake::connect(&daemon, &["full"]);
    let sequence = marked.open(0, 100).unwrap();
    marked.mark(&sequence, 0, &[4; 100]).unwrap();
    append_noise(&marked, &sequence, 100);
    let fork = sequence.fork(None).unwrap();
    fork.truncate(50).unwrap();
    marked.reserve(&[(&fork, 200)]).unwrap();
    marked.mark(&fork, 50, &[1; 150]).unwrap();
    append_noise(&marked, &fork, 200);
    drop(ask(&marked, &fork, 1, Hint::None).unwrap());
}

#[test]
fn artifacts_are_read_by_kind_and_those_that_do_not_fit_are_refused() {
    use kvoyant_methods::{Artifact, ArtifactKind, Fingerprint, Tensor, TensorArtifact};
    let daemon = Daemon::start(DAEMON, &[]);
    let artifact = |kind, model| {
        let tensor = Tensor { shape: vec![2], values: vec![1.0, 2.0] };
        let tensors = [("conv1.bias".to_owned(), tensor)].into_iter().collect();
        let artifact = TensorArtifact::new(kind, model, tensors, Default::default()).unwrap();
        Artifact::Tensors(std::sync::Arc::new(artifact)).to_bytes().unwrap()
    };
    let own = Fingerprint([0; 16]);
    let trained = fake::spec(&["attention-predictor"]);
    let missing = refusal(&daemon, trained.clone(), &[]);
    assert!(missing.contains("predictor"), "{missing}");
    let other = refusal(&daemon, trained.clone(), &[artifact(ArtifactKind::Predictor, Fingerprint([7; 16]))]);
    assert!(other.contains("0707"), "{other}");
    let wrong = refusal(&daemon, trained.clone(), &[artifact(ArtifactKind::Predictor, own)]);
    assert!(wrong.contains("history of nothing"), "{wrong}");
    let hash = artifact(ArtifactKind::Hash, own);
    let twice = refusal(&daemon, trained.clone(), &[hash.clone(), hash.clone()]);
    assert!(twice.contains("two hash artifacts"), "{twice}");
    let count = ArtifactKind::ALL.len() + 1;
    let many = refusal(&daemon, trained, &vec![hash.clone(); count]);
    assert!(many.contains(&format!("{count} artifacts")), "{many}");
    let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
    drop(client.register(fake::spec(&["full"]), &[hash]).unwrap());
}
