//! Progress on stderr: bars on a terminal, one plain line a step elsewhere.

use std::borrow::Cow;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress(Where);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Bars,
    Lines,
    Nowhere,
}

impl Progress {
    /// Bars if stderr is a terminal, else lines.
    pub(crate) fn new() -> Self {
        Self(if console::Term::stderr().is_term() { Where::Bars } else { Where::Lines })
    }

    /// Bars if stderr is a terminal, else nothing.
    pub(crate) fn on_a_terminal() -> Self {
        Self(if console::Term::stderr().is_term() { Where::Bars } else { Where::Nowhere })
    }

    /// Nothing.
    #[cfg(test)]
    pub(crate) fn quiet() -> Self {
        Self(Where::Nowhere)
    }

    /// A step of `total` parts.
    pub(crate) fn step(self, name: impl Into<Cow<'static, str>>, total: u64) -> Step {
        self.with(name.into(), total, "{msg:<34} {bar:24.cyan/dim} {pos:>6}/{len:<6} {elapsed:>4}")
    }

    /// A step of `total` bytes.
    pub(crate) fn bytes(self, name: impl Into<Cow<'static, str>>, total: u64) -> Step {
        self.with(
            name.into(),
            total,
            "{msg:<34} {bar:16.cyan/dim} {bytes:>10}/{total_bytes:<10} {elapsed:>4}",
        )
    }

    /// A step whose length nobody knows.
    pub(crate) fn spinner(self, name: impl Into<Cow<'static, str>>) -> Step {
        let step = self.with(name.into(), 0, "{msg:<34} {spinner:.cyan} {elapsed:>4}");
        step.bar.enable_steady_tick(Duration::from_millis(120));
        step
    }

    /// One line of its own.
    pub(crate) fn note(self, line: &str) {
        crate::say::say(line);
    }

    fn with(self, name: Cow<'static, str>, total: u64, template: &str) -> Step {
        let target = match self.0 {
            Where::Bars => ProgressDrawTarget::stderr(),
            Where::Lines => {
                crate::say::say(&name);
                ProgressDrawTarget::hidden()
            }
            Where::Nowhere => ProgressDrawTarget::hidden(),
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━━─");
        let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(name);
        bar.tick();
        Step { bar, lines: self.0 == Where::Lines }
    }
}

/// A step under way. Its bar goes away when it is dropped; what was learnt stands in the table.
#[derive(Debug)]
pub(crate) struct Step {
    bar: ProgressBar,
    lines: bool,
}

impl Step {
    /// `done` parts of the total are done.
    pub(crate) fn set(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// The step's next part has this name.
    pub(crate) fn rename(&self, name: String) {
        if self.lines {
            crate::say::say(&name);
        }
        self.bar.set_message(name);
    }

    /// `more` parts are done.
    pub(crate) fn advance(&self, more: u64) {
        self.bar.inc(more);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
