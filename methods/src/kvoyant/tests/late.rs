//! Rows that would come after their layer has begun.

use super::*;

#[test]
fn of_rows_that_would_come_late_none_is_waited_for_where_everything_is_wanted_either() {
    let method = method("budget=1000,hint=ahead,late=leave");
    let case = case(&method, 0, 280, 1.0, 1);
    let (hint, resident) = (case.hint.clone(), {
        let mut resident = Selection::new();
        for _ in 0..2 {
            resident.push(40, 60);
            resident.finish_head();
        }
        resident
    });
    let in_time = Some(InTime { resident: &resident, first_head: 0, room: 7 });
    let context = SelectContext { in_time, ..SelectContext::new(&small(), 1, 280, &hint) };
    let some = case.kept.clone().select_with(&method, &context, &mut Scratch::new());
    assert!(some.late() > 100, "{}", some.late());
    for head in 0..2 {
        let come = some.tokens(head).filter(|t| *t < 256 && !(40..60).contains(t)).count();
        assert_eq!(come, 7);
    }
}

#[test]
fn of_rows_that_would_come_late_the_best_come_and_the_others_are_estimated() {
    let method = method("budget=24,hint=ahead,late=leave");
    assert!(
        method.needs().leaves_late && !self::method("budget=24,scope=layer,late=leave").needs().leaves_late
    );
    for seed in 0..20 {
        let case = case(&method, 0, 280, 1.0, seed);
        let hint = case.hint.clone();
        let context = SelectContext::new(&small(), 1, 280, &hint);
        let all = case.kept.clone().select_with(&method, &context, &mut Scratch::new());
        assert_eq!(all.late(), 0);
        // Every third of the chosen rows is there, and others that nobody asked for.
        let mut resident = Selection::new();
        for head in 0..2 {
            let mut tokens: Vec<u32> = all.tokens(head).step_by(3).chain([9, 77]).collect();
            tokens.sort_unstable();
            tokens.dedup();
            tokens.iter().for_each(|t| resident.push(*t as usize, *t as usize + 1));
            resident.finish_head();
        }
        for room in [0, 3, 1000] {
            let in_time = Some(InTime { resident: &resident, first_head: 0, room });
            let mut kept = case.kept.clone();
            let some =
                kept.select_with(&method, &SelectContext { in_time, ..context.clone() }, &mut Scratch::new());
            let mut late = 0;
            for head in 0..2 {
                let there: Vec<u32> = resident.tokens(head).collect();
                // Rows without a digest are selected besides.
                let absent = |t: &u32| *t < 256 && !there.contains(t);
                let come: Vec<u32> = some.tokens(head).filter(absent).collect();
                let left: Vec<u32> = all.tokens(head).filter(|t| absent(t) && !come.contains(t)).collect();
                assert!(
                    some.tokens(head).all(|t| all.tokens(head).any(|a| a == t)),
                    "nothing else is chosen"
                );
                assert!(all.tokens(head).all(|t| !there.contains(&t) || some.tokens(head).any(|s| s == t)));
                assert_eq!(come.len(), room.min(come.len() + left.len()), "room for {room}");
                // By the queries that chose, what is left weighs no more than what comes, but for what codes are off by.
                let shares = true_shares(&case, head, small().candidates(280).start..256);
                let share = |t: &u32| f64::from(shares[*t as usize]);
                let least = come.iter().map(share).fold(f64::INFINITY, f64::min);
                let most = left.iter().map(share).fold(0.0, f64::max);
                assert!(come.is_empty() || most <= least * 1.5, "{most} {least}");
                late += left.len();
            }
            assert_eq!(some.late(), late);
            // What was late does not move the threshold.
            let mut waited = case.kept.clone();
            waited.select_with(&method, &context, &mut Scratch::new());
            assert_eq!(kept.sequence(), waited.sequence());
        }
    }
}
