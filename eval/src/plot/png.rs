//! A scene as PNG: painted twice as large and averaged, letters from a bitmap font of 8 × 8.

use font8x8::UnicodeFonts;

use super::scene::{Anchor, Colour, Item, Mark, Scene};

/// What the encoder says.
pub type PngError = ::png::EncodingError;

/// Samples across and down a pixel.
const SAMPLES: usize = 2;

/// Pixels of a letter's side.
const LETTER: f64 = 8.0;

const INK: Colour = Colour(0x22, 0x22, 0x22);

/// The whole file.
pub(super) fn draw(scene: &Scene) -> Result<Vec<u8>, PngError> {
    let mut canvas = Canvas::new(scene.width, scene.height);
    for item in &scene.items {
        canvas.item(item);
    }
    let (width, height, pixels) = canvas.averaged();
    let mut out = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut out, width as u32, height as u32);
    encoder.set_color(::png::ColorType::Rgb);
    encoder.set_depth(::png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(out)
}

/// Samples of a picture.
struct Canvas {
    width: usize,
    height: usize,
    samples: Vec<Colour>,
}

impl Canvas {
    fn new(width: f64, height: f64) -> Self {
        let (width, height) = (width.ceil() as usize * SAMPLES, height.ceil() as usize * SAMPLES);
        Self { width, height, samples: vec![Colour(0xff, 0xff, 0xff); width * height] }
    }

    fn item(&mut self, item: &Item) {
        match item {
            Item::Line { from, to, width, colour } => self.line(*from, *to, *width, *colour),
            Item::Mark { mark, at, radius, colour } => self.mark(*mark, *at, *radius, *colour),
            Item::Words { at, size, anchor, words } => self.words(*at, *size, *anchor, words),
        }
    }

    /// Paints every sample within a box for which `inside` holds; places are in pixels.
    fn paint(
        &mut self,
        low: (f64, f64),
        high: (f64, f64),
        colour: Colour,
        inside: impl Fn(f64, f64) -> bool,
    ) {
        let scale = SAMPLES as f64;
        let range = |low: f64, high: f64, most: usize| {
            let first = (low * scale).floor().max(0.0) as usize;
            first.min(most)..((high * scale).ceil().max(0.0) as usize).min(most)
        };
        for y in range(low.1, high.1, self.height) {
            for x in range(low.0, high.0, self.width) {
                if inside((x as f64 + 0.5) / scale, (y as f64 + 0.5) / scale) {
                    self.samples[y * self.width + x] = colour;
                }
            }
        }
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64, colour: Colour) {
        let half = width / 2.0;
        let low = (from.0.min(to.0) - half, from.1.min(to.1) - half);
        let high = (from.0.max(to.0) + half, from.1.max(to.1) + half);
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let length = (dx * dx + dy * dy).max(f64::MIN_POSITIVE);
        self.paint(low, high, colour, |x, y| {
            let along = (((x - from.0) * dx + (y - from.1) * dy) / length).clamp(0.0, 1.0);
            let (px, py) = (x - from.0 - along * dx, y - from.1 - along * dy);
            px * px + py * py <= half * half
        });
    }

    fn mark(&mut self, mark: Mark, at: (f64, f64), r: f64, colour: Colour) {
        let (low, high) = ((at.0 - r, at.1 - r), (at.0 + r, at.1 + r));
        self.paint(low, high, colour, |x, y| match mark {
            Mark::Disc => (x - at.0).powi(2) + (y - at.1).powi(2) <= r * r,
            Mark::Square => true,
            Mark::Triangle => (x - at.0).abs() <= (y - at.1 + r) / 2.0,
        });
    }

    fn words(&mut self, at: (f64, f64), size: f64, anchor: Anchor, words: &str) {
        // Letters of a bitmap are wider than those of a typeface of the same size.
        let pixel = (size / LETTER).min(1.0 + size / 60.0);
        let step = LETTER * pixel;
        let width = words.chars().count() as f64 * step;
        let left = match anchor {
            Anchor::Start => at.0,
            Anchor::Middle => at.0 - width / 2.0,
            Anchor::End => at.0 - width,
        };
        let top = at.1 - (LETTER - 1.0) * pixel;
        for (place, letter) in words.chars().enumerate() {
            let rows = font8x8::BASIC_FONTS
                .get(letter)
                .or_else(|| font8x8::LATIN_FONTS.get(letter))
                .or_else(|| font8x8::GREEK_FONTS.get(letter))
                .unwrap_or_default();
            for (y, row) in rows.iter().enumerate() {
                for x in (0..8).filter(|x| row >> x & 1 == 1) {
                    let corner = (left + place as f64 * step + f64::from(x) * pixel, top + y as f64 * pixel);
                    let end = (corner.0 + pixel, corner.1 + pixel);
                    self.paint(corner, end, INK, |x, y| {
                        x >= corner.0 && x < end.0 && y >= corner.1 && y < end.1
                    });
                }
            }
        }
    }

    /// Width, height and RGB bytes.
    fn averaged(&self) -> (usize, usize, Vec<u8>) {
        let (width, height) = (self.width / SAMPLES, self.height / SAMPLES);
        let mut pixels = Vec::with_capacity(width * height * 3);
        for y in 0..height {
            for x in 0..width {
                let mut sums = [0_usize; 3];
                for at in 0..SAMPLES * SAMPLES {
                    let (dx, dy) = (at % SAMPLES, at / SAMPLES);
                    let Colour(r, g, b) = self.samples[(y * SAMPLES + dy) * self.width + x * SAMPLES + dx];
                    sums.iter_mut().zip([r, g, b]).for_each(|(sum, value)| *sum += usize::from(value));
                }
                pixels.extend(sums.map(|sum| (sum / (SAMPLES * SAMPLES)) as u8));
            }
        }
        (width, height, pixels)
    }
}
