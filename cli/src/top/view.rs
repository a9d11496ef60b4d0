//! The screen: 80 columns and 24 lines are enough.

use kvoyant_daemon::status::StatusReport;
use kvoyant_daemon::tiers::nvme::DeviceState;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Row, Sparkline, Table};

use super::limits::{Limit, What};
use super::rates::{History, Rates};
use crate::status::{bytes, counted, plain};

/// What is drawn.
pub(super) struct Shown<'a> {
    /// How things are.
    pub(super) status: &'a StatusReport,
    /// What is done.
    pub(super) rates: &'a Rates,
    /// Times of answers.
    pub(super) history: &'a History,
    /// What limits.
    pub(super) limit: Limit,
    /// Why the daemon did not answer just now.
    pub(super) error: Option<String>,
}

/// Draws it.
pub(super) fn draw(frame: &mut Frame<'_>, shown: &Shown<'_>) {
    const SPARKLINE_AND_FOOT: (u16, u16) = (2, 1);
    let [line, sessions, foot] = parts(frame, shown, SPARKLINE_AND_FOOT);
    sparkline(frame, shown, line);
    table(frame, shown, sessions);
    let foot_text = match &shown.error {
        Some(error) => Span::styled(plain(error, 200), Style::new().fg(Color::Red)),
        None => Span::styled("q: leave", Style::new().add_modifier(Modifier::DIM)),
    };
    frame.render_widget(Paragraph::new(Line::from(foot_text)), foot);
}

/// Draws what is worth printing: one look has no history, and nobody can press a key.
pub(super) fn print(frame: &mut Frame<'_>, shown: &Shown<'_>) {
    let [_, sessions, _] = parts(frame, shown, (0, 0));
    table(frame, shown, sessions);
}

/// Lines that [`print()`] fills.
pub(super) fn printed_lines(shown: &Shown<'_>) -> u16 {
    let (above, head) = (1 + 2 + tiers(shown.status).len() + 3, 1);
    u16::try_from(above + head + shown.status.sessions.len()).unwrap_or(u16::MAX)
}

/// Draws what is above the table, and says where the rest goes: a sparkline and a foot of these heights, the table between them.
fn parts(frame: &mut Frame<'_>, shown: &Shown<'_>, (line, foot): (u16, u16)) -> [Rect; 3] {
    let tiers = tiers(shown.status);
    let heights = [
        Constraint::Length(1),
        Constraint::Length(2),
        Constraint::Length(tiers.len() as u16),
        Constraint::Length(3),
        Constraint::Length(line),
        Constraint::Min(1),
        Constraint::Length(foot),
    ];
    let [head, limit, places, work, line, sessions, foot] = Layout::vertical(heights).areas(frame.area());
    frame.render_widget(Paragraph::new(title(shown.status)), head);
    frame.render_widget(Paragraph::new(limits(&shown.limit)), limit);
    frame.render_widget(Paragraph::new(tiers), places);
    frame.render_widget(Paragraph::new(rates(shown)), work);
    [line, sessions, foot]
}

fn bold(text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), Style::new().add_modifier(Modifier::BOLD))
}

fn title(status: &StatusReport) -> Line<'static> {
    let totals = &status.totals;
    let text = format!(
        "  {} ({}), {}, {}, {}",
        status.device,
        status.mode,
        counted(status.lanes as u64, "lane"),
        counted(totals.sessions, "session"),
        counted(totals.sequences, "sequence"),
    );
    Line::from(vec![bold(format!("kvoyantd {}", status.version)), text.into()])
}

fn limits(limit: &Limit) -> Vec<Line<'static>> {
    let colour = match limit.what {
        What::Nothing => Color::Green,
        What::Failure => Color::Red,
        _ => Color::Yellow,
    };
    let name = match limit.what {
        What::Failure => "failure",
        What::Memory => "memory",
        What::Disk => "disk",
        What::Cpu => "CPU",
        What::Link => "link",
        What::Nothing => "none",
    };
    vec![
        Line::from(vec![
            "limit   ".into(),
            Span::styled(name, Style::new().fg(colour).add_modifier(Modifier::BOLD)),
            format!(": {}", limit.why).into(),
        ]),
        Line::from(format!("turn    {}", limit.turn)),
    ]
}

/// Cells of a bar: as many as leave room for its figures in 80 columns.
const BAR: usize = 16;

/// A bar, and its figures.
fn bar(name: &str, used: u64, total: u64, more: &str) -> Line<'static> {
    let share = used as f64 / total.max(1) as f64;
    let filled = ((share * BAR as f64).round() as usize).min(BAR);
    let colour = if share > 0.95 { Color::Red } else { Color::Blue };
    Line::from(vec![
        format!("{name:<8}").into(),
        Span::styled("█".repeat(filled), Style::new().fg(colour)),
        "░".repeat(BAR - filled).into(),
        format!(" {:>3.0} % of {}{more}", share * 100.0, bytes(total)).into(),
    ])
}

fn tiers(status: &StatusReport) -> Vec<Line<'static>> {
    let (arena, totals) = (&status.arena, &status.totals);
    let more = format!(", KV {}, digests {}", bytes(totals.kv_bytes), bytes(totals.digest_bytes));
    let mut lines = Vec::new();
    if let Some(gpu) = &status.gpu {
        lines.push(bar(
            "device",
            gpu.used_bytes,
            gpu.set_aside_bytes,
            &format!(", {}", plain(&gpu.model, 24)),
        ));
    }
    lines.push(bar("arena", arena.used_bytes, arena.total_bytes, &more));
    for device in &status.spill {
        let state = if device.state == DeviceState::Serving { "" } else { ", FAILED" };
        let late =
            if device.late_reads > 0 { format!(", {} late", device.late_reads) } else { String::new() };
        lines.push(bar("disk", device.used_bytes, device.total_bytes, &format!("{state}{late}")));
    }
    lines
}

fn rates(shown: &Shown<'_>) -> Vec<Line<'static>> {
    let work = &shown.rates.all;
    let percent =
        |share: Option<f64>| share.map_or("–".to_owned(), |share| format!("{:.0} %", share * 100.0));
    let lanes = work.select_s / shown.status.lanes.max(1) as f64;
    vec![
        Line::from(format!(
            "answers {:>9.0}/s   hits {:>6}   lanes busy {:>5}   moved {}/s",
            work.answers,
            percent(work.hits()),
            percent(Some(lanes)),
            bytes(work.moved_bytes as u64)
        )),
        Line::from(format!(
            "pages   {:>9.0}/s read   {:.0}/s written   waited for {}   late rows {:.0}/s",
            work.pages_read,
            work.pages_written,
            percent(Some(work.page_wait_s / shown.status.sessions.len().max(1) as f64)),
            work.late_rows
        )),
        Line::from(format!("time of an answer: {}", work.answer_s().map_or("–".into(), time))),
    ]
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

fn sparkline(frame: &mut Frame<'_>, shown: &Shown<'_>, area: Rect) {
    let data = shown.history.last(usize::from(area.width));
    frame.render_widget(Sparkline::default().data(data).style(Style::new().fg(Color::Cyan)), area);
}

/// Columns of the table, and which of them is the one that gives way.
const COLUMNS: usize = 9;
const NAME: usize = 1;

/// As wide as what is in them: numbers are never cut, names are.
fn widths(head: &[&str; COLUMNS], rows: &[[String; COLUMNS]], all: usize) -> [usize; COLUMNS] {
    let widest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut widths = std::array::from_fn(|column| head[column].len().max(widest(column)));
    // One column between each two.
    let others = widths.iter().sum::<usize>() - widths[NAME] + COLUMNS - 1;
    widths[NAME] = widths[NAME].min(all.saturating_sub(others)).max(head[NAME].len());
    widths
}

fn table(frame: &mut Frame<'_>, shown: &Shown<'_>, area: Rect) {
    let head = ["id", "client", "uid", "pid", "seqs", "KV", "answers/s", "moved/s", "hits"];
    let mut sessions: Vec<_> = shown.status.sessions.iter().collect();
    let work = |id: u64| shown.rates.sessions.get(&id).copied().unwrap_or_default();
    // Whoever does most is on top, and those who do nothing keep their order.
    sessions.sort_by(|a, b| work(b.id).answers.total_cmp(&work(a.id).answers).then(a.id.cmp(&b.id)));
    let rows = sessions.into_iter().map(|session| {
        let work = work(session.id);
        let hits = work.hits().map_or("–".to_owned(), |share| format!("{:.0} %", share * 100.0));
        [
            session.id.to_string(),
            plain(&session.client, 64),
            session.uid.to_string(),
            session.pid.to_string(),
            session.sequences.to_string(),
            bytes(session.kv_bytes),
            format!("{:.0}", work.answers),
            bytes(work.moved_bytes as u64),
            hits,
        ]
    });
    let rows: Vec<[String; COLUMNS]> = rows.collect();
    let widths = widths(&head, &rows, usize::from(area.width));
    let rows = rows.into_iter().map(|cells| {
        let cells = cells.into_iter().zip(widths).enumerate();
        Row::new(cells.map(|(column, (cell, width))| if column == NAME { plain(&cell, width) } else { cell }))
    });
    let style = Style::new().add_modifier(Modifier::REVERSED);
    let widths = widths.map(|width| Constraint::Length(width as u16));
    frame.render_widget(Table::new(rows, widths).header(Row::new(head).style(style)), area);
}
