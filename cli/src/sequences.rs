//! `kvoyant sequences`: what is open and what is suspended, and what an operator does with it.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvoyant_daemon::admin::{
    AdminError, BringOrder, ImageReport, SequenceReport, SequencesReport, SuspendOrder, bring_image,
    fetch_sequences, remove_image, suspend_sequence,
};
use kvoyant_daemon::keeper::Kept;

use crate::args::{SequencesArgs, SequencesWhat};
use crate::operate::{admin_socket, told};
use crate::status::{bytes, counted, plain};

/// Does what is asked, and says what came of it, with a line's end.
///
/// # Errors
/// If the daemon cannot be asked, or refuses.
pub(crate) fn text(args: &SequencesArgs) -> Result<String, AdminError> {
    let path = admin_socket(args.admin.as_ref())?;
    let me = nix::unistd::geteuid().as_raw();
    match &args.what {
        None => {
            let report = fetch_sequences(&path)?;
            told(args.json, path, &report, || words(&report, now_unix()))
        }
        Some(SequencesWhat::Suspend(suspend)) => {
            let order = SuspendOrder {
                session: suspend.session,
                sequence: suspend.sequence.clone(),
                image: suspend.image.clone(),
                overwrite: suspend.overwrite,
                label: suspend.label.clone(),
            };
            let done = suspend_sequence(&path, &order)?;
            let (handle, session) = (&suspend.sequence, suspend.session);
            told(args.json, path, &done, || {
                format!(
                    "sequence {handle} of session {session} is suspended as {:?} of user {}; an engine of theirs resumes it by that name\n",
                    done.image, done.uid
                )
            })
        }
        Some(SequencesWhat::Resume(image)) => {
            let uid = Some(image.uid.unwrap_or(me));
            let report = bring_image(&path, &BringOrder { image: image.image.clone(), uid })?;
            told(args.json, path, &report, || brought(&report))
        }
        Some(SequencesWhat::Rm(image)) => {
            let done = remove_image(&path, image.uid.unwrap_or(me), &image.image)?;
            told(args.json, path, &done, || {
                format!("image {:?} of user {} is erased, here and remotely\n", done.image, done.uid)
            })
        }
    }
}

fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn brought(image: &ImageReport) -> String {
    format!(
        "image {:?} is here, and every byte of it as it was written: {}, {}; an engine of user {} resumes it by that name\n",
        image.name,
        counted(u64::from(image.tokens.unwrap_or(0)), "token"),
        bytes(image.bytes),
        or_dash(image.uid),
    )
}

fn words(report: &SequencesReport, now: u64) -> String {
    let mut out = String::new();
    if report.sequences.is_empty() {
        out.push_str("no sequence is open\n");
    } else {
        let _ = writeln!(
            out,
            "{:>7}  {:<8}  {:<16}  {:>6}  {:<18}  {:>9}  {:>9}  {:>7}",
            "session", "sequence", "client", "uid", "method", "tokens", "in memory", "on disk"
        );
        report.sequences.iter().for_each(|sequence| line(sequence, &mut out));
    }
    out.push('\n');
    match (report.images.is_empty(), report.keeps_images) {
        (true, true) => out.push_str("no image is kept\n"),
        (true, false) => out.push_str("no images: start the daemon with --store and a folder to keep some\n"),
        (false, _) => {
            let _ = writeln!(
                out,
                "{:<30}  {:>6}  {:<8}  {:>9}  {:>11}  {:<14}  where",
                "image", "uid", "kind", "tokens", "bytes", "made"
            );
            report.images.iter().for_each(|image| image_lines(image, now, &mut out));
        }
    }
    if let Some(error) = &report.remote_error {
        let _ = writeln!(out, "\nimages that are in the remote store alone are missing: {error}");
    }
    out
}

fn line(sequence: &SequenceReport, out: &mut String) {
    let _ = writeln!(
        out,
        "{:>7}  {:<8}  {:<16}  {:>6}  {:<18}  {:>9}  {:>9}  {:>7}",
        sequence.session,
        sequence.sequence,
        plain(&sequence.client, 16),
        sequence.uid,
        plain(&sequence.method, 18),
        sequence.tokens,
        or_dash(sequence.pages),
        or_dash(sequence.spilled_pages),
    );
}

fn image_lines(image: &ImageReport, now: u64, out: &mut String) {
    let made = image.created_unix.map_or_else(|| "–".to_owned(), |made| age(now.saturating_sub(made)));
    let _ = writeln!(
        out,
        "{:<30}  {:>6}  {:<8}  {:>9}  {:>11}  {made:<14}  {}",
        plain(&image.name, 128),
        or_dash(image.uid),
        image.kind.as_deref().unwrap_or("–"),
        or_dash(image.tokens),
        bytes(image.bytes),
        match image.kept {
            Kept::Here => "here",
            Kept::Remotely => "remotely",
            Kept::Both => "both",
        }
    );
    if let Some(label) = image.label.as_deref().filter(|label| !label.is_empty()) {
        let _ = writeln!(out, "    {}", plain(label, 96));
    }
    if let Some(damage) = &image.damaged {
        let uid = image.uid.map(|uid| format!(" --uid {uid}")).unwrap_or_default();
        let _ = writeln!(
            out,
            "    DAMAGED: {}; `kvoyant sequences rm {}{uid}`, and compute it again",
            plain(damage, 500),
            plain(&image.name, 128)
        );
    }
}

fn age(seconds: u64) -> String {
    // `HumanDuration` rounds to one unit: "3 minutes".
    format!("{} ago", indicatif::HumanDuration(Duration::from_secs(seconds)))
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_fits_into_a_hundred_columns_and_says_what_to_do_about_damage() {
        let sequence = SequenceReport {
            session: 1_000_000,
            uid: 100_000,
            client: "an engine's name \x1b[2J that is long".into(),
            sequence: "1023.17".into(),
            method: "infinigen:budget=5%,skew=off,pool=50%".into(),
            tokens: 1_048_576,
            pages: Some(8_388_608),
            spilled_pages: None,
        };
        let image = ImageReport {
            name: "chat-7".into(),
            uid: Some(1000),
            kind: Some("sequence".into()),
            tokens: Some(1_048_576),
            bytes: 123 << 30,
            created_unix: Some(100),
            label: Some("with a note".into()),
            kept: Kept::Both,
            damaged: None,
        };
        let damaged = ImageReport {
            name: "broken".into(),
            kind: None,
            tokens: None,
            created_unix: None,
            label: None,
            kept: Kept::Remotely,
            damaged: Some("pages is missing".into()),
            ..image.clone()
        };
        let report = SequencesReport {
            sequences: vec![sequence],
            images: vec![image, damaged],
            keeps_images: true,
            remote_error: Some("it is dead".into()),
        };
        let text = words(&report, 100 + 59 * 60);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        for part in [
            "59 minutes ago  both",
            "with a note",
            "DAMAGED: pages is missing; `kvoyant sequences rm broken --uid 1000`",
            "missing: it is dead",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains('\x1b'), "{text}");
        let none = SequencesReport {
            sequences: Vec::new(),
            images: Vec::new(),
            keeps_images: false,
            remote_error: None,
        };
        assert!(words(&none, 0).contains("--store"));
    }
}
