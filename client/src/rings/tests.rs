use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::memory::Memfd;
use kvoyant_protocol::wire::{BlockRun, HeadEntry, PartialLayout, RestLayout, Served, Status};

use super::*;

#[test]
fn partial_attentions_are_read_only_where_the_table_has_room_for_them() {
    let layout = Layout::new(Limits::default()).unwrap();
    let memory = |bytes| Memfd::create("rings-test", bytes).unwrap().map(true).unwrap();
    let maps = Maps::new(layout, memory(layout.c2d_bytes), memory(layout.d2c_bytes), 0);
    let d2c = Arc::clone(&maps.d2c);
    let partial = PartialLayout { query_heads: 2, values: 3 };
    let behind = Behind { partial, rest: RestLayout { query_heads: 2, values: 3 } };
    // Two members of one KV head each, a run, and the words 1, 2, … behind it.
    let (heads, run) = (2 * size_of::<HeadEntry>(), size_of::<BlockRun>());
    let words: Vec<u32> = (1..=2 * partial.words() as u32).collect();
    d2c.write(layout.table(1) + heads + run, bytemuck::cast_slice(&words)).unwrap();
    let ready = [&[Status::Ready as u8][..], &[0; 63]].concat();
    let ready = Completion::parse(ready[..].try_into().unwrap(), &layout.limits, Served::default()).unwrap();
    let table = |bytes: usize, partials| {
        let completion = Completion { batch: 2, ticket: 1, table_bytes: bytes as u32, partials, ..ready };
        maps.table(&completion, 1, behind)
    };
    let whole = heads + run + 2 * partial.bytes();
    assert_eq!(table(whole, true).unwrap().partials, words);
    assert_eq!(table(heads + run, false).unwrap().partials, [0; 0]);
    for bytes in [0, heads, heads + 2 * partial.bytes() - 4, whole - 4, whole - partial.bytes()] {
        assert!(matches!(table(bytes, true), Err(Error::Broken(_))), "{bytes} bytes");
    }
}

#[test]
fn only_the_stream_that_has_promised_releases_by_the_word() {
    let layout = Layout::new(Limits::default()).unwrap();
    let memory = |bytes| Memfd::create("rings-test", bytes).unwrap().map(true).unwrap();
    let maps = Maps::new(layout, memory(layout.c2d_bytes), memory(layout.d2c_bytes), 0);
    let c2d = Arc::clone(&maps.c2d);
    let rings = Rings::new(maps, (Duration::ZERO, Duration::ZERO));
    let word = |ticket, stream| matches!(rings.released_by_stream(ticket, stream), StreamRelease::Word);

    assert!(word(1, 7));
    assert!(word(2, 7), "one stream keeps its own order");
    let StreamRelease::Late(late) = rings.released_by_stream(3, 9) else {
        panic!("another stream's word would let go of what the first still reads");
    };
    // The driver's thread says so while a request holds the rings.
    let submit = lock(&rings.submit);
    late.add(3);
    drop(submit);
    assert!(!word(4, 9), "the first stream has released nothing yet");
    c2d.store_u32(c2d::RELEASED, 2);
    let StreamRelease::Late(late) = rings.released_by_stream(5, 9) else {
        panic!("4 is still held");
    };
    late.add(4);
    late.add(5);
    assert!(word(6, 9), "nothing is promised any more");
}

#[test]
fn without_streams_the_word_that_they_write_means_nothing_however_many_answers_there_were() {
    let layout = Layout::new(Limits::default()).unwrap();
    let memory = |bytes| Memfd::create("rings-test", bytes).unwrap().map(true).unwrap();
    let maps = Maps::new(layout, memory(layout.c2d_bytes), memory(layout.d2c_bytes), 0);
    let rings = Rings::new(maps, (Duration::ZERO, Duration::ZERO));
    lock(&rings.submit).released_through = (1 << 31) - 1;
    (0..3).for_each(|more| rings.release((1 << 31) + more));
    assert_eq!(lock(&rings.submit).released_through, (1 << 31) + 2);
}

#[test]
fn an_answer_to_anything_but_what_was_asked_is_an_error() {
    let layout = Layout::new(Limits::default()).unwrap();
    let memory = |bytes| Memfd::create("rings-test", bytes).unwrap().map(true).unwrap();
    let ready = [&[Status::Ready as u8][..], &[0; 63]].concat();
    let ready = Completion::parse(ready[..].try_into().unwrap(), &layout.limits, Served::default()).unwrap();
    // Layer 2 of three sequences was asked for, with ticket 1.
    for (ticket, layer, batch) in [(1, 2, 3), (1, 2, 4), (1, 2, 1), (1, 1, 3), (2, 2, 3), (7, 2, 3)] {
        let maps = Maps::new(layout, memory(layout.c2d_bytes), memory(layout.d2c_bytes), 0);
        let (c2d, d2c) = (Arc::clone(&maps.c2d), Arc::clone(&maps.d2c));
        let rings = Rings::new(maps, (Duration::ZERO, Duration::ZERO));
        lock(&rings.receive).asked.insert(1, (2, 3));
        let mut producer = Producer::completions(layout);
        producer.stage(&d2c, &Completion { ticket, layer, batch, ..ready }.encode());
        producer.publish(&d2c, &c2d);
        let right = (ticket, layer, batch) == (1, 2, 3);
        match rings.collect() {
            Ok(()) => assert!(right, "{ticket}, {layer}, {batch}"),
            Err(Error::Broken(said)) => {
                assert!(!right && said.contains(&format!("ticket {ticket}")), "{said}");
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(lock(&rings.receive).done.contains_key(&1), right);
    }
}
