//! A screen that is drawn into memory, and what is made of statuses.

use std::time::Duration;

use kvoyant_daemon::status::{SessionReport, StatusReport};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::limits::{self, What};
use super::printed;
use super::rates::{History, Rates};
use super::view::{Shown, draw};
use crate::status::tests::sample;

/// The sample two seconds later: a hundred answers, of which each selected for 1 ms and copied for 2 ms.
fn later(before: &StatusReport) -> StatusReport {
    let mut after = before.clone();
    let session = &mut after.sessions[0];
    session.speculations += 100;
    session.rows_selected += 1000;
    session.rows_hit += 900;
    session.bytes_moved += 4 << 20;
    session.select_ns += 100_000_000;
    session.transfer_ns += 200_000_000;
    after
}

fn rates() -> Rates {
    let before = sample();
    Rates::between(&before, &later(&before), Duration::from_secs(2))
}

fn screen(status: &StatusReport, rates: &Rates, error: Option<String>, size: (u16, u16)) -> String {
    let mut history = History::default();
    history.add(rates);
    let limit = limits::of(status, rates);
    let shown = Shown { status, rates, history: &history, limit, error };
    let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).unwrap();
    terminal.draw(|frame| draw(frame, &shown)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn two_statuses_become_what_is_done_in_a_second() {
    let rates = rates();
    let all = rates.all;
    assert_eq!((all.answers, all.moved_bytes), (50.0, (2 << 20) as f64));
    assert_eq!(all.hits(), Some(0.9));
    assert!((all.answer_s().unwrap() - 0.003).abs() < 1e-9);
    assert_eq!(rates.sessions[&7], all);
    assert_eq!((Rates::default().all.hits(), Rates::default().all.answer_s()), (None, None));
}

#[test]
fn a_daemon_that_was_started_anew_has_done_nothing_yet_and_counters_never_run_backwards() {
    let before = sample();
    let mut after = later(&before);
    after.boot_id = "another".into();
    assert_eq!(Rates::between(&before, &after, Duration::from_secs(1)), Rates::default());
    assert_eq!(Rates::between(&before, &later(&before), Duration::ZERO), Rates::default());
    let backwards = Rates::between(&later(&before), &before, Duration::from_secs(1));
    assert_eq!(backwards.all.answers, 0.0);
    // A session that has just come has no past to compare with.
    let mut one_more = later(&before);
    one_more.sessions[0].id = 8;
    assert!(Rates::between(&before, &one_more, Duration::from_secs(1)).sessions.is_empty());
}

#[test]
fn what_limits_is_named_with_what_to_turn() {
    let (status, none) = (sample(), Rates::default());
    assert_eq!(limits::of(&status, &rates()).what, What::Nothing);
    let mut full = status.clone();
    full.arena.used_bytes = full.arena.total_bytes;
    let limit = limits::of(&full, &none);
    assert_eq!(limit.what, What::Memory);
    assert!(limit.turn.contains("`arena`") && limit.turn.contains("`spill`"), "{limit:?}");
    let mut busy = none.clone();
    busy.all.select_s = 0.9;
    assert_eq!(limits::of(&status, &busy).what, What::Cpu);
    assert!(limits::of(&status, &busy).why.contains("90 %"));
    // With two sessions, one that waits half of its time waits a quarter of both.
    busy.all.page_wait_s = 0.8;
    assert_eq!(
        limits::of(&status, &busy).what,
        What::Disk,
        "four times its bound, and the lanes 1.3 times theirs"
    );
    let mut copies = none;
    copies.all.transfer_s = 0.6;
    assert_eq!(limits::of(&status, &copies).what, What::Link);
    copies.all.transfer_s = 0.4;
    assert_eq!(limits::of(&status, &copies).what, What::Nothing);
}

#[test]
fn everything_is_on_a_screen_of_80_by_24_and_nothing_that_a_client_chose_steers_it() {
    let status = sample();
    let text = screen(&status, &rates(), None, (80, 24));
    for part in [
        "kvoyantd 1.2.3",
        "limit   none",
        "arena",
        "6 % of 1.00 GiB",
        "answers        50/s",
        "hits   90 %",
        "moved 2.00 MiB/s",
        "time of an answer: 3.0 ms",
        "4242",
        "engine[2J",
        "q: leave",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(!text.contains('\x1b'));
    // Nothing is cut at the edge, with figures as long as they come.
    let mut large = status.clone();
    large.arena.used_bytes = 99 * (large.arena.total_bytes / 100);
    (large.totals.kv_bytes, large.totals.digest_bytes) = (987_654_321, 987_654_321);
    let text = screen(&large, &rates(), None, (80, 24));
    // The backend shows lines in quotes.
    let line =
        text.lines().map(|line| line.trim_matches('"')).find(|line| line.starts_with("arena")).unwrap();
    assert!(line.trim_end().ends_with("digests 941.90 MiB"), "{line}");
}

#[test]
fn numbers_are_whole_however_long_they_are_and_names_give_way() {
    let mut status = sample();
    let session = &mut status.sessions[0];
    (session.id, session.uid, session.pid, session.kv_bytes) = (1_234_567, 1_234_500_500, 4_194_304, 1 << 40);
    session.client = "an-engine-with-a-name-of-fifty-characters-and-more-than-that".into();
    for width in [80, 100, 200] {
        let text = screen(&status, &rates(), None, (width, 24));
        for whole in ["1234567", "1234500500", "4194304", "1.00 TiB", "hits"] {
            assert!(text.contains(whole), "{whole} is not in\n{text}");
        }
        assert_eq!(text.contains("more-than-that"), width == 200, "{text}");
    }
}

#[test]
fn what_is_printed_has_a_line_for_each_session_and_none_for_nothing() {
    let mut status = sample();
    let session = status.sessions[0].clone();
    status.sessions.extend((8..60).map(|id| SessionReport { id, ..session.clone() }));
    let (history, none) = (History::default(), Rates::default());
    let limit = limits::of(&status, &none);
    let text = printed(&Shown { status: &status, rates: &none, history: &history, limit, error: None });
    assert_eq!(text.lines().count(), 1 + 2 + 1 + 3 + 1 + 53, "{text}");
    assert!(text.lines().all(|line| !line.is_empty()) && !text.contains("q: leave"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("59 "), "{text}");
}

#[test]
fn a_daemon_that_does_not_answer_is_said_and_no_screen_is_too_small() {
    let status = sample();
    let text = screen(&status, &rates(), Some("nobody listens".into()), (80, 24));
    assert!(text.contains("nobody listens") && text.contains("4242"), "{text}");
    for size in [(1, 1), (10, 3), (79, 7), (300, 100)] {
        assert!(!screen(&status, &rates(), None, size).is_empty());
    }
}
