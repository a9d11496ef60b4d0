//! What people read.

use crate::runner::Result;

/// One line of the table.
#[must_use]
pub fn line(result: &Result) -> String {
    let mark = if result.holds() { " " } else { "!" };
    let latency = |times: Option<crate::neighbour::Latency>| {
        times.map_or_else(
            || format!("{:>8} {:>8}", "-", "-"),
            |t| format!("{:>8.0} {:>8.0}", t.median_us, t.p99_us),
        )
    };
    let back = result.back_ms.map_or_else(|| format!("{:>8}", "-"), |ms| format!("{ms:>8.1}"));
    let neighbour = if result.harm.is_some() { "HARMED" } else { "unharmed" };
    let mut line = format!(
        "{mark} {:<34} {:<7} {:<9} {} {} {back}",
        result.name,
        result.verdict,
        neighbour,
        latency(result.before),
        latency(result.during),
    );
    if !result.holds() {
        line.push_str(&format!("\n    expected {}; it said: {}", result.expected, result.said));
        if let Some(harm) = &result.harm {
            line.push_str(&format!("\n    the neighbour: {harm}"));
        }
    }
    line
}

/// The heads of the columns.
#[must_use]
pub fn head() -> String {
    format!(
        "  {:<34} {:<7} {:<9} {:>17} {:>17} {:>8}\n  {:<34} {:<7} {:<9} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "",
        "",
        "",
        "before, us",
        "during, us",
        "back",
        "attack",
        "verdict",
        "neighbour",
        "median",
        "p99",
        "median",
        "p99",
        "ms",
    )
}

/// The last lines: how many held, and what the neighbour felt.
#[must_use]
pub fn sum(results: &[Result]) -> String {
    let held = results.iter().filter(|result| result.holds()).count();
    let unharmed = results.iter().filter(|result| result.harm.is_none()).count();
    let ratios = results.iter().filter_map(|result| {
        Some((result.during?.median_us / result.before?.median_us.max(f64::MIN_POSITIVE), result.name))
    });
    let mut ratios: Vec<_> = ratios.collect();
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let doubled = ratios.iter().filter(|(ratio, _)| *ratio > 2.0).count();
    let mut text = format!(
        "{held} of {} attacks ended as they have to, {unharmed} left the neighbour unharmed",
        results.len()
    );
    if let (Some((median, _)), Some((worst, name))) = (ratios.get(ratios.len() / 2), ratios.last()) {
        text.push_str(&format!(
            "\nthe neighbour's median latency: {median:.2}x its own before in the median attack, {worst:.2}x in the worst ({name}); \
             above 2x in {doubled}"
        ));
    }
    text
}
