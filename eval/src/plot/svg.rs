//! A scene as SVG.

use std::fmt::Write;

use super::scene::{Anchor, Colour, Item, Mark, Scene};

/// The whole file.
pub(super) fn draw(scene: &Scene) -> String {
    let (width, height) = (scene.width, scene.height);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    for item in &scene.items {
        match item {
            Item::Line { from, to, width, colour } => {
                let _ = writeln!(
                    out,
                    "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{}\" stroke-width=\"{width}\"/>",
                    from.0,
                    from.1,
                    to.0,
                    to.1,
                    hex(*colour)
                );
            }
            Item::Mark { mark, at: (x, y), radius: r, colour } => {
                let fill = hex(*colour);
                let _ = match mark {
                    Mark::Disc => {
                        writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\" fill=\"{fill}\"/>")
                    }
                    Mark::Square => writeln!(
                        out,
                        "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{side}\" height=\"{side}\" fill=\"{fill}\"/>",
                        x - r,
                        y - r,
                        side = 2.0 * r
                    ),
                    Mark::Triangle => writeln!(
                        out,
                        "<path d=\"M {x:.1} {:.1} L {:.1} {:.1} L {:.1} {:.1} Z\" fill=\"{fill}\"/>",
                        y - r,
                        x - r,
                        y + r,
                        x + r,
                        y + r
                    ),
                };
            }
            Item::Words { at: (x, y), size, anchor, words } => {
                let anchor = match anchor {
                    Anchor::Start => "start",
                    Anchor::Middle => "middle",
                    Anchor::End => "end",
                };
                let _ = writeln!(
                    out,
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{}</text>",
                    escaped(words)
                );
            }
        }
    }
    out.push_str("</svg>\n");
    out
}

fn hex(colour: Colour) -> String {
    format!("#{:02x}{:02x}{:02x}", colour.0, colour.1, colour.2)
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
