//! Charts of points and lines, as SVG and as PNG, for people who would rather look.
//!
//! A [`Chart`] is laid out once into a scene of lines, marks and words; `svg` and `png` draw the same scene.

mod axis;
mod png;
mod scene;
mod svg;

pub use self::png::PngError;

use self::axis::Axis;
use self::scene::{Anchor, Colour, Item, Mark, Scene};
use crate::row::Row;

/// One line of a chart.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, in the order in which they are joined.
    pub points: Vec<(f64, f64)>,
}

/// A chart.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chart {
    /// Stands above it.
    pub title: String,
    /// Stands below the horizontal axis.
    pub x_label: String,
    /// Stands above the vertical axis.
    pub y_label: String,
    /// The horizontal axis is logarithmic; points at or below 0 stand at its left end.
    pub x_log: bool,
    /// The vertical axis is logarithmic; points at or below 0 stand at its lower end.
    pub y_log: bool,
    /// The lines.
    pub series: Vec<Series>,
}

const WIDTH: f64 = 1040.0;
const HEIGHT: f64 = 560.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 720.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 500.0;
const TITLE_SIZE: f64 = 16.0;
const TEXT_SIZE: f64 = 12.0;
const MARK_RADIUS: f64 = 4.0;

const INK: Colour = Colour(0x22, 0x22, 0x22);
const GRID: Colour = Colour(0xdd, 0xdd, 0xdd);

/// Colours that are told apart by most people (Okabe, Ito 2008), and two more; after these, marks change.
const PALETTE: [Colour; 9] = [
    Colour(0x00, 0x72, 0xb2),
    Colour(0xd5, 0x5e, 0x00),
    Colour(0x00, 0x9e, 0x73),
    Colour(0xcc, 0x79, 0xa7),
    Colour(0xe6, 0x9f, 0x00),
    Colour(0x56, 0xb4, 0xe9),
    Colour(0x00, 0x00, 0x00),
    Colour(0x8c, 0x56, 0x4b),
    Colour(0x7f, 0x7f, 0x7f),
];

impl Chart {
    /// As an SVG file.
    #[must_use]
    pub fn svg(&self) -> String {
        svg::draw(&self.scene())
    }

    /// As a PNG file.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn png(&self) -> Result<Vec<u8>, PngError> {
        png::draw(&self.scene())
    }

    fn scene(&self) -> Scene {
        let values = |of: fn(&(f64, f64)) -> f64| {
            self.series.iter().flat_map(|series| &series.points).map(of).filter(|value| value.is_finite())
        };
        let x = Axis::new(values(|point| point.0), self.x_log, LEFT, RIGHT);
        let y = Axis::new(values(|point| point.1), self.y_log, BOTTOM, TOP);
        let mut items = vec![Item::words(LEFT, 28.0, TITLE_SIZE, Anchor::Start, &self.title)];
        for (at, label) in x.ticks() {
            items.push(Item::Line { from: (at, TOP), to: (at, BOTTOM), width: 1.0, colour: GRID });
            items.push(Item::words(at, BOTTOM + 18.0, TEXT_SIZE, Anchor::Middle, &label));
        }
        for (at, label) in y.ticks() {
            items.push(Item::Line { from: (LEFT, at), to: (RIGHT, at), width: 1.0, colour: GRID });
            items.push(Item::words(LEFT - 8.0, at + 4.0, TEXT_SIZE, Anchor::End, &label));
        }
        items.push(Item::Line { from: (LEFT, BOTTOM), to: (RIGHT, BOTTOM), width: 1.5, colour: INK });
        items.push(Item::Line { from: (LEFT, BOTTOM), to: (LEFT, TOP), width: 1.5, colour: INK });
        items.push(Item::words(
            (LEFT + RIGHT) / 2.0,
            BOTTOM + 42.0,
            TEXT_SIZE,
            Anchor::Middle,
            &self.x_label,
        ));
        items.push(Item::words(LEFT, TOP - 10.0, TEXT_SIZE, Anchor::Middle, &self.y_label));
        for (at, series) in self.series.iter().enumerate() {
            let colour = PALETTE[at % PALETTE.len()];
            let mark = Mark::ALL[at / PALETTE.len() % Mark::ALL.len()];
            let points: Vec<(f64, f64)> = series
                .points
                .iter()
                .filter(|point| point.0.is_finite() && point.1.is_finite())
                .map(|point| (x.at(point.0), y.at(point.1)))
                .collect();
            for pair in points.windows(2) {
                items.push(Item::Line { from: pair[0], to: pair[1], width: 1.5, colour });
            }
            items.extend(points.iter().map(|at| Item::Mark { mark, at: *at, radius: MARK_RADIUS, colour }));
            let line = TOP + 8.0 + 20.0 * at as f64;
            items.push(Item::Mark { mark, at: (RIGHT + 24.0, line - 4.0), radius: MARK_RADIUS, colour });
            items.push(Item::words(RIGHT + 36.0, line, TEXT_SIZE, Anchor::Start, &series.name));
        }
        Scene { width: WIDTH, height: HEIGHT.max(TOP + 28.0 + 20.0 * self.series.len() as f64), items }
    }
}

/// The charts of a comparison, with the names of their files: for each source and length, recall and KL over budget or bytes.
#[must_use]
pub fn charts(rows: &[Row]) -> Vec<(String, Chart)> {
    let mut places: Vec<(&str, usize)> = rows.iter().map(|row| (row.source.as_str(), row.length)).collect();
    places.sort_unstable();
    places.dedup();
    let mut all = Vec::new();
    for (source, length) in places {
        let of: Vec<&Row> = rows.iter().filter(|row| row.source == source && row.length == length).collect();
        let file = |what: &str| {
            let plain: String =
                source.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
            format!("{what}-{plain}-{length}")
        };
        let place = format!("{source}, {length} tokens");
        let bytes = |row: &Row| Some(row.bytes_per_token / 1e6);
        let chart = |title: &str, y_label: &str, y_log| Chart {
            title: format!("{title} ({place})"),
            x_label: "MB moved for each token".into(),
            y_label: y_label.into(),
            x_log: true,
            y_log,
            series: Vec::new(),
        };
        let kl = chart("Divergence from dense attention", "KL, nats", true);
        all.push((file("kl-bytes"), kl.with(&of, bytes, |row| row.kl_to_dense)));
        let accuracy = chart("Scores of the tasks", "score", false);
        all.push((file("accuracy-bytes"), accuracy.with(&of, bytes, |row| row.accuracy)));
        let error = chart("Error of the attention output", "relative error", false);
        all.push((file("error-bytes"), error.with(&of, bytes, |row| row.output_error)));
        let recall = Chart {
            x_label: "budget, share of the rows".into(),
            x_log: false,
            ..chart("Attention covered", "share of the attention mass", false)
        };
        all.push((file("recall-budget"), recall.with(&of, |row| row.budget, |row| row.attention_mass)));
    }
    all.retain(|(_, chart)| !chart.series.is_empty());
    all
}

impl Chart {
    /// A line for each method that has points.
    fn with(
        mut self,
        rows: &[&Row],
        x: impl Fn(&Row) -> Option<f64>,
        y: impl Fn(&Row) -> Option<f64>,
    ) -> Self {
        for row in rows {
            let (Some(x), Some(y)) = (x(row), y(row)) else { continue };
            let name = if row.budget.is_some() { row.method.clone() } else { row.title() };
            match self.series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push((x, y)),
                None => self.series.push(Series { name, points: vec![(x, y)] }),
            }
        }
        for series in &mut self.series {
            series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        Chart {
            title: "A <title> & more".into(),
            x_label: "x".into(),
            y_label: "y".into(),
            x_log: true,
            y_log: true,
            series: (0..21)
                .map(|i| Series {
                    name: format!("line {i}"),
                    points: vec![(0.5 + f64::from(i), 0.01), (20.0, 0.3), (0.0, f64::NAN)],
                })
                .collect(),
        }
    }

    #[test]
    fn an_svg_has_every_line_and_escapes_its_words() {
        let text = chart().svg();
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
        assert!(text.contains("A &lt;title&gt; &amp; more") && text.contains("line 20"));
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn a_png_reads_back_and_is_not_empty() {
        let bytes = chart().png().unwrap();
        let decoder = ::png::Decoder::new(std::io::Cursor::new(bytes));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(reader.info().width, 1040);
        let inked = pixels.chunks(3).filter(|pixel| pixel.iter().any(|value| *value < 200)).count();
        assert!(inked > 2000, "{inked} pixels");
    }

    #[test]
    fn a_chart_of_nothing_and_one_of_a_single_point_can_be_drawn() {
        assert!(Chart::default().svg().contains("</svg>"));
        let one = Series { name: "one".into(), points: vec![(3.0, 3.0)] };
        assert!(Chart { series: vec![one], ..Chart::default() }.png().is_ok());
    }

    #[test]
    fn rows_become_a_line_for_each_method_and_source() {
        let row = |method: &str, budget, bytes, kl| Row {
            method: method.into(),
            spec: method.into(),
            source: "model".into(),
            length: 2048,
            budget: Some(budget),
            bytes_per_token: bytes,
            kl_to_dense: Some(kl),
            attention_mass: Some(0.9),
            ..Row::default()
        };
        let rows = [row("quest", 0.06, 2e6, 0.1), row("quest", 0.03, 1e6, 0.2), row("hata", 0.03, 1e6, 0.1)];
        let charts = charts(&rows);
        let names: Vec<&str> = charts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["kl-bytes-model-2048", "recall-budget-model-2048"]);
        assert_eq!(charts[0].1.series[0].points, [(1.0, 0.2), (2.0, 0.1)]);
        assert_eq!(charts[0].1.series.len(), 2);
    }
}
