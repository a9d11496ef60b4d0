//! What a capture holds is what attention saw.

use std::ops::ControlFlow;

use crate::common::{some_tokens, worst};
use kvoyant_engine::synthetic::tiny;
use kvoyant_engine::*;

#[test]
fn a_capture_has_the_queries_of_its_steps_and_the_rows_as_stored() {
    let model = tiny(3);
    let tokens = some_tokens(60, 4);
    let options = CaptureOptions { steps: 8, prompt_queries: 5, ..CaptureOptions::default() };
    let mut calls = Vec::new();
    let capture = Capture::take(&model, &tokens, options, &mut |done, all| {
        calls.push((done, all));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((capture.tokens, capture.steps, capture.prompt_queries), (60, 8, 5));
    assert_eq!(calls.first(), Some(&(52, 60)));
    assert!(calls.iter().all(|(_, all)| *all == 60));

    let shape = capture.shape.clone();
    let width = shape.query_heads * shape.head_dim;
    assert_eq!(capture.q.len(), shape.layers * 8 * width);
    assert_eq!(capture.q[..8 * width], capture.hint[..8 * width], "nothing precedes layer 0");
    assert!(worst(&capture.q[8 * width..], &capture.hint[8 * width..]) > 1e-3, "predictions are no truths");

    // The same text read in one go: its queries are the steps', and its rows are the capture's, to f16.
    let all = CaptureOptions { steps: 0, prompt_queries: 13, ..CaptureOptions::default() };
    let whole = Capture::take(&model, &tokens, all, &mut |_, _| ControlFlow::Continue(())).unwrap();
    for layer in 0..shape.layers {
        for step in 0..8 {
            let query = &capture.q[(layer * 8 + step) * width..][..width];
            assert!(worst(query, whole.prompt_query(layer, 5 + step)) < 0.02);
        }
        for index in 0..5 {
            assert!(worst(capture.prompt_query(layer, index), whole.prompt_query(layer, index)) < 1e-4);
        }
        for head in 0..shape.kv_heads {
            assert!(worst(capture.keys(layer, head), whole.keys(layer, head)) < 0.02);
        }
    }
    assert_eq!(capture.marks.len(), 60);
}

#[test]
fn a_capture_that_is_stopped_says_so() {
    let model = tiny(3);
    let options = CaptureOptions { steps: 8, ..CaptureOptions::default() };
    let stopped = Capture::take(&model, &some_tokens(30, 4), options, &mut |done, _| {
        if done > 24 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(ForwardError::Interrupted { done: 25, total: 30 })));
}
