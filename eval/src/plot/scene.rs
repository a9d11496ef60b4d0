//! What a chart consists of once it is laid out. Places are in pixels, from the upper left corner.

/// Red, green and blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Colour(pub(super) u8, pub(super) u8, pub(super) u8);

/// Where words begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// Shapes of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Disc,
    Square,
    Triangle,
}

impl Mark {
    pub(super) const ALL: [Self; 3] = [Self::Disc, Self::Square, Self::Triangle];
}

/// One thing to draw.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Item {
    Line {
        from: (f64, f64),
        to: (f64, f64),
        width: f64,
        colour: Colour,
    },
    Mark {
        mark: Mark,
        at: (f64, f64),
        radius: f64,
        colour: Colour,
    },
    /// Words on the baseline `at`.
    Words {
        at: (f64, f64),
        size: f64,
        anchor: Anchor,
        words: String,
    },
}

impl Item {
    pub(super) fn words(x: f64, y: f64, size: f64, anchor: Anchor, words: &str) -> Self {
        Self::Words { at: (x, y), size, anchor, words: words.to_owned() }
    }
}

/// Everything, in the order in which it is drawn.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scene {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) items: Vec<Item>,
}
