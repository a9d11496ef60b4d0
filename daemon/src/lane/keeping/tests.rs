use super::*;

#[test]
fn slots_that_were_touched_are_told_once_in_order_and_only_those_that_there_are() {
    let mut touched = Touched::default();
    for slot in [70, 3, 3, 200, usize::MAX] {
        touched.mark(slot);
    }
    let mut told = Vec::new();
    touched.take(false, 200, |slot| told.push(slot));
    assert_eq!(told, [3, 70]);
    told.clear();
    touched.take(false, 500, |slot| told.push(slot));
    assert_eq!(told, [0; 0]);
    touched.mark(1);
    touched.take(true, 3, |slot| told.push(slot));
    assert_eq!(told, [0, 1, 2]);
}
