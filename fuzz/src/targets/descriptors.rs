//! Descriptors of both rings, and layouts of limits that a peer proposes.

use kvoyant_protocol::graph::{GraphLayout, GraphSpec};
use kvoyant_protocol::layout::{Layout, Limits, PageGeometry};
use kvoyant_protocol::wire::{Append, Completion, Operation, Request, Served, Speculate};
use kvoyant_tests::raw;

use crate::input::Input;

/// What parses is within the limits and says itself again; where things lie is inside their memory.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let descriptor = input.array::<64>();
    let limits = Limits {
        ring_slots: 1 << (input.u8() % 12),
        batch_max: input.u32(),
        hint_bytes: input.u32(),
        table_bytes: input.u32(),
        sequences_max: input.u32(),
    };
    if let Ok(request) = Request::parse(&descriptor, &limits) {
        assert_eq!(Request::parse(&request.encode(), &limits).as_ref(), Ok(&request));
        if let Operation::Speculate(Speculate { batch, hint_bytes, .. }) = request.operation {
            assert!((1..=limits.batch_max).contains(&batch) && hint_bytes <= limits.hint_bytes);
        }
    }
    let served = Served { boot_id: u64::from(descriptor[62]), generation: u32::from(descriptor[1] >> 2) };
    if let Ok(completion) = Completion::parse(&descriptor, &limits, served) {
        assert_eq!(completion.encode()[..2], descriptor[..2]);
        let _ = completion.timeline();
        assert!(completion.table_bytes <= limits.table_bytes, "{completion:?} of {limits:?}");
    }
    let (index, ticket) = (input.u32(), input.u64());
    if let Ok(layout) = Layout::new(limits) {
        assert!(layout.descriptor(index) + 64 <= layout.c2d_bytes.min(layout.d2c_bytes));
        assert!(layout.batch(index) + limits.batch_max as usize * 16 <= layout.c2d_bytes);
        assert!(layout.hints(index) + limits.hint_bytes as usize <= layout.c2d_bytes);
        assert!(layout.doorbell(index) + 4 <= layout.c2d_bytes);
        assert!(layout.table(ticket) + limits.table_bytes as usize <= layout.d2c_bytes);
        let _ = layout.table_runs(input.u16().into());
    }
    let spec = GraphSpec { rows: input.u32(), sequences: input.u32(), reports: input.u32() };
    if let Ok(layout) = GraphLayout::new(spec, input.u16().into(), input.u16().into()) {
        assert!(layout.report(ticket) + layout.report_stride() <= layout.mailbox_bytes());
    }
    let geometry =
        PageGeometry { page_rows: 1 + usize::from(input.u8()), row_bytes: 1 + usize::from(input.u16()) };
    if geometry.pages_per_extent() > 0 {
        let (_, offset) = geometry.locate(index);
        assert!(offset + geometry.row_bytes <= kvoyant_protocol::EXTENT_BYTES);
    }
}

/// A request of two kinds and an answer.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let limits = Limits::default();
    let mut tail = vec![4];
    for limit in [limits.batch_max, limits.hint_bytes, limits.table_bytes, limits.sequences_max] {
        tail.extend_from_slice(&limit.to_le_bytes());
    }
    let speculate = Operation::Speculate(Speculate { batch: 2, hint_bytes: 512, ..raw::speculate(1) });
    let operations = [
        speculate,
        Operation::Append(Append { layer: None, batch: 1 }),
        Operation::Mark { payload_bytes: 64 },
        Operation::Release,
    ];
    let requests = operations.map(|operation| Request { release_through: 0, operation }.encode().to_vec());
    let answer = [vec![1], vec![0; 63]].concat();
    requests.into_iter().chain([answer]).map(|descriptor| [descriptor, tail.clone()].concat()).collect()
}
