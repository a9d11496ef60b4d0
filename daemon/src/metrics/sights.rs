//! The part of the text that is about deadlines, comparisons with exact attention, and what clients say of themselves.

use std::fmt;

use kvoyant_protocol::wire::Told;
use prometheus_client::encoding::NoLabelSet;

use super::histogram::Counts;
use super::seen::{COVERED, DEADLINE_US, QUERIES, REJECTIONS, Sights, Slack};
use super::text::{Labels, Page, SECONDS, ratio, seconds};

/// Everything of it.
pub(super) fn write(all: &Sights, page: &mut Page<'_>) -> fmt::Result {
    let told = |told: Told| all.told[told as usize] as f64;
    page.counter(
        ("session_time", SECONDS),
        "Time that sessions have been open, all together",
        seconds(all.open_ns),
    )?;
    page.counter(
        ("stall", SECONDS),
        "Time that clients' threads stood still until answers came, as the clients say; over session_time it is the stall share",
        seconds(all.told[Told::WaitedNs as usize]),
    )?;
    slack(&all.slack, page)?;
    let after: u64 = all.slack.iter().map(|layer| layer.after.count()).sum();
    let misses = [
        ("leave", all.left_late as f64),
        ("wait", after as f64),
        ("partial", told(Told::Partial)),
        ("resident_only", told(Told::ResidentOnly)),
        ("none", told(Told::GaveUp)),
    ];
    let labels = misses.map(|(fallback, _)| [("fallback", fallback.to_owned())]);
    let values: Vec<(&Labels, f64)> =
        labels.iter().zip(misses).map(|(labels, (_, count))| (&labels[..], count)).collect();
    let help = "Answers that were not whole by their deadline, by what stood in for the rest: leave (rows were left to the estimate), wait (nothing; they \
                came late), and as clients say partial, resident_only, and none (they waited to their own deadline in vain)";
    page.counters(("deadline_misses", None), help, &values)?;
    checks(all, page)?;
    let labels = REJECTIONS.map(|(_, why)| [("why", why.to_owned())]);
    let values: Vec<(&Labels, f64)> =
        labels.iter().zip(all.rejected).map(|(labels, count)| (&labels[..], count as f64)).collect();
    let help = "Descriptors that were refused, which ended their sessions: ring (indices), format, order (tickets, positions), contents, work (too much of it)";
    page.counters(("descriptors_rejected", None), help, &values)
}

/// By layer, for those that had deadlines.
fn slack(layers: &[Slack], page: &mut Page<'_>) -> fmt::Result {
    type Side = (&'static str, &'static str, fn(&Slack) -> &Counts);
    let sides: [Side; 2] = [
        (
            "deadline_slack",
            "Answers that were ready by their deadline, by the time that was left, by layer",
            |layer| &layer.before,
        ),
        (
            "deadline_overrun",
            "Answers that came after their deadline, by how much later, by layer",
            |layer| &layer.after,
        ),
    ];
    for (name, help, side) in sides {
        if layers.iter().all(|layer| side(layer).count() == 0) {
            continue;
        }
        let mut family = page.histogram(name, &SECONDS, help)?;
        for (number, times) in layers.iter().map(side).enumerate().filter(|(_, times)| times.count() > 0) {
            let labels = [("layer", number.to_string())];
            let sum = seconds(times.sum_ns);
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                sum,
                times.count(),
                &times.in_fewer(&DEADLINE_US),
                None,
            )?;
        }
    }
    Ok(())
}

/// What sampled comparisons found.
fn checks(all: &Sights, page: &mut Page<'_>) -> fmt::Result {
    let kinds = ["selected", "needed", "both"];
    let of = |query: usize, kind: usize| {
        [("query", QUERIES[query].1.to_owned()), ("rows", kinds[kind].to_owned())]
    };
    let labels: Vec<_> = (0..QUERIES.len()).flat_map(|query| (0..3).map(move |kind| (query, kind))).collect();
    let named: Vec<_> = labels.iter().map(|(query, kind)| of(*query, *kind)).collect();
    let values: Vec<(&Labels, f64)> = named
        .iter()
        .zip(&labels)
        .map(|(labels, (query, kind))| (&labels[..], all.checks[*query].rows[*kind] as f64))
        .collect();
    let help = "Rows of answers that were compared with exact attention (`check_every`), by whose query: selected, needed (the fewest with 90 % of the \
                attention to rows that may be selected), both. Precision is both over selected, recall both over needed";
    page.counters(("check_rows", None), help, &values)?;
    let help = "Answers that were compared with exact attention, by the share of it that the rows they named have, by whose query";
    let unit = ratio();
    let mut family = page.histogram("check_covered", &unit, help)?;
    for ((_, query), found) in QUERIES.iter().zip(&all.checks) {
        let ends = COVERED.into_iter().chain([f64::INFINITY]);
        let buckets: Vec<_> = ends.zip(found.covered).collect();
        let labels = [("query", *query)];
        let sum = found.covered_millionths as f64 * 1e-6;
        family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, found.count(), &buckets, None)?;
    }
    Ok(())
}
