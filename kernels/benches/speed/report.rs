//! Times against goals: a table for people, JSON for programs.

use kvoyant_kernels::Path;

use crate::limits::PRODUCTS;
use crate::tasks::{
    CODE_BYTES, COLUMN_BYTES, COLUMNS, DIM, F16_BYTES, GROUP, PAGE, READ_BYTES, ROWS, TOKENS, codes,
    i8_bytes, selection_bytes,
};

/// What is asked of a ratio.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    None,
}

impl Goal {
    fn is_met(self, ratio: f64) -> Option<bool> {
        match self {
            Self::AtLeast(goal) => Some(ratio >= goal),
            Self::AtMost(goal) => Some(ratio <= goal),
            Self::None => None,
        }
    }
}

/// One line of the report.
pub(crate) struct Row {
    what: String,
    micros: f64,
    /// Decimal GB/s, or G products/s.
    rate: f64,
    /// What the ratio compares with.
    against: &'static str,
    ratio: f64,
    goal: Goal,
}

pub(crate) fn rows(seconds: &impl Fn(&str) -> f64) -> Vec<Row> {
    let (read, products) = (READ_BYTES as f64 / seconds("read"), PRODUCTS / seconds("products"));
    let limit = |what: &str, rate: f64, name: &str| Row {
        what: what.to_owned(),
        micros: seconds(name) * 1e6,
        rate: rate / 1e9,
        against: "",
        ratio: 1.0,
        goal: Goal::None,
    };
    // A kernel that reads so many bytes and sums so many products cannot be faster than either takes.
    let kernel = |what: String, name: &str, bytes: usize, sums: usize, goal: f64| {
        let time = seconds(name);
        let (reading, summing) = (bytes as f64 / read, sums as f64 / products);
        Row {
            what,
            micros: time * 1e6,
            rate: bytes as f64 / time / 1e9,
            against: if reading >= summing { "read bandwidth" } else { "arithmetic peak" },
            ratio: reading.max(summing) / time,
            goal: Goal::AtLeast(goal),
        }
    };
    let share = |what: &str, name: &str, scoring: &str, against, goal| Row {
        what: what.to_owned(),
        micros: seconds(name) * 1e6,
        rate: TOKENS as f64 * 4.0 / seconds(name) / 1e9,
        against,
        ratio: seconds(name) / seconds(scoring),
        goal,
    };
    let pages = TOKENS / PAGE;
    let codes = codes().flat_map(|codes| {
        let [scores, all] = codes.names();
        let products = codes.tokens * codes.dim * codes.queries;
        [
            kernel(format!("scores {}", codes.what()), &scores, codes.score_bytes(), products, 0.6),
            Row {
                what: "  with weights, choice, rest and bounds".into(),
                micros: seconds(&all) * 1e6,
                rate: codes.score_bytes() as f64 / seconds(&all) / 1e9,
                against: "time of scores",
                ratio: seconds(&all) / seconds(&scores),
                goal: Goal::AtMost(1.3),
            },
        ]
    });
    let mut rows = vec![
        limit("read in order, GB/s", read, "read"),
        limit("products summed in f32, G/s", products, "products"),
        kernel(
            format!("page bounds f16, d={DIM} g={GROUP}"),
            "bounds f16",
            F16_BYTES,
            pages * DIM * GROUP,
            0.8,
        ),
        // Sums of whole numbers are cheaper than products in f32: only reading counts.
        kernel(format!("page bounds int8, d={DIM} g={GROUP}"), "bounds int8", i8_bytes(), 0, 0.8),
        kernel(format!("Hamming sum, 128 bits g={GROUP}"), "hamming sum", CODE_BYTES, 0, 0.6),
        // Writes as many bytes as it reads.
        Row {
            goal: Goal::None,
            ..kernel(format!("Hamming each, 128 bits g={GROUP}"), "hamming each", 2 * CODE_BYTES, 0, 0.0)
        },
        kernel("attention f16 pages, d=64 g=3".into(), "attention 64", ROWS * 256, ROWS * 2 * 64 * 3, 0.7),
        kernel("attention f16 pages, d=128 g=4".into(), "attention 128", ROWS * 512, ROWS * 2 * 128 * 4, 0.7),
        Row {
            goal: Goal::None,
            ..kernel(
                format!("partial scores f16, {COLUMNS} columns g={GROUP}"),
                "partial scores",
                COLUMN_BYTES,
                TOKENS * COLUMNS * GROUP,
                0.0,
            )
        },
        share("top-k of 128K", "top-k", "partial scores", "time of partial scores", Goal::AtMost(0.15)),
        share("top-k of 128K", "top-k", "hamming sum", "time of Hamming sum", Goal::AtMost(0.15)),
        Row {
            what: "page selection int8, 128K tokens, 8 heads".into(),
            micros: seconds("page selection") * 1e6,
            rate: selection_bytes() as f64 / seconds("page selection") / 1e9,
            against: "reading those digests",
            ratio: seconds("page selection") / seconds("read digests"),
            goal: Goal::AtMost(1.5),
        },
    ];
    rows.extend(codes);
    rows
}

pub(crate) fn table(rows: &[Row], mib: usize, rounds: usize, percentile: usize) {
    println!("kernels: {}, arena: {mib} MiB, percentile {percentile} of {rounds} rounds\n", Path::best());
    println!("{:<43} {:>9} {:>8} {:>7}  {:<23} {:>7}", "", "µs", "GB/s", "ratio", "against", "goal");
    for row in rows {
        let goal = match row.goal {
            Goal::AtLeast(goal) => format!("≥ {goal:.2}"),
            Goal::AtMost(goal) => format!("≤ {goal:.2}"),
            Goal::None => String::new(),
        };
        let met = row.goal.is_met(row.ratio).map_or("", |met| if met { "met" } else { "MISSED" });
        let (what, against) = (&row.what, row.against);
        println!(
            "{what:<43} {:>9.1} {:>8.2} {:>7.2}  {against:<23} {goal:>7}  {met}",
            row.micros, row.rate, row.ratio
        );
    }
}

pub(crate) fn json(rows: &[Row], mib: usize, rounds: usize, percentile: usize) {
    println!(
        "{{\"kernels\": \"{}\", \"arena_mib\": {mib}, \"rounds\": {rounds}, \"percentile\": {percentile}, \"rows\": [",
        Path::best()
    );
    for (i, row) in rows.iter().enumerate() {
        let (goal, bound) = match row.goal {
            Goal::AtLeast(goal) => (format!("{goal}"), "\"at_least\""),
            Goal::AtMost(goal) => (format!("{goal}"), "\"at_most\""),
            Goal::None => ("null".to_owned(), "null"),
        };
        let met = row.goal.is_met(row.ratio).map_or("null".to_owned(), |met| met.to_string());
        println!(
            "  {{\"what\": \"{}\", \"us\": {:.3}, \"rate_g_per_s\": {:.4}, \"ratio\": {:.4}, \"against\": \"{}\", \
             \"goal\": {goal}, \"bound\": {bound}, \"met\": {met}}}{}",
            row.what,
            row.micros,
            row.rate,
            row.ratio,
            row.against,
            if i + 1 < rows.len() { "," } else { "" }
        );
    }
    println!("]}}");
}
