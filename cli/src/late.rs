//! What an engine did without the daemon's rows, said on stderr: nothing stands in for anything in silence.

use kvoyant_engine::{DaemonKv, Fallbacks};

/// Says what was attended by other rows than the method's, if anything was.
pub(crate) fn say(kv: &DaemonKv) {
    for line in lines(kv.alone(), kv.fallbacks()) {
        crate::say::say(line);
    }
}

fn lines(alone: Option<&str>, fallbacks: Fallbacks) -> Vec<String> {
    let Fallbacks { alone: layers, partial, resident_only, rows_left_out, estimates } = fallbacks;
    let mut all = Vec::new();
    if let Some(why) = alone {
        all.push(format!(
            "the rest was answered without the daemon: {layers} layers attended to all rows, in this process, because {why}"
        ));
    }
    if partial + resident_only > 0 {
        all.push(format!(
            "{} layers were not waited for: {partial} attended to sinks, window and what the last answer named, {resident_only} to sinks and \
             window alone; {rows_left_out} rows were left out",
            partial + resident_only
        ));
    }
    if estimates > 0 {
        all.push(format!("{estimates} estimates of rows left out were late, and are left out too"));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_nothing_and_every_fallback_has_its_line() {
        assert!(lines(None, Fallbacks::default()).is_empty());
        let some = Fallbacks { alone: 4, partial: 3, resident_only: 2, rows_left_out: 99, estimates: 1 };
        let said = lines(Some("the daemon has gone"), some);
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].ends_with("because the daemon has gone") && said[0].contains("4 layers"), "{said:?}");
        assert!(said[1].starts_with("5 layers") && said[1].contains("99 rows"), "{said:?}");
    }
}
