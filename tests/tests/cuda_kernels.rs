//! Every kernel through a CUDA driver, from source to launch, against the CPU's: on softcuda, or on the card that
//! `KVOYANT_TEST_CUDA` gives the number of.

#[path = "../softcuda/tests/cases/mod.rs"]
mod cases;

use std::collections::HashMap;

use bytemuck::Pod;
use cases::Device;
use kvoyant_cuda::{
    Context, DeviceBuffer, ExecGraph, Function, KernelCache, PinnedBuffer, Priority, Stream, driver,
};
use kvoyant_kernels::cuda::{Launch, source};
use kvoyant_tests::softcuda::{Machine, on_softcuda};

/// A real card's number.
const CARD: &str = "KVOYANT_TEST_CUDA";

/// Bytes of device memory, and of mapped host memory, for one case.
const ROOM: usize = 64 << 20;

/// Bytes that are copied at once.
const STAGE: usize = 4 << 20;

/// A card, and what a case has put on it.
struct Card {
    context: Context,
    stream: Stream,
    memory: DeviceBuffer,
    mapped: PinnedBuffer,
    stage: PinnedBuffer,
    used: usize,
    mapped_used: usize,
    kernels: KernelCache,
    functions: HashMap<String, Function>,
    graphs: HashMap<(String, Vec<u8>), ExecGraph>,
    _folder: tempfile::TempDir,
}

impl Card {
    fn new(ordinal: u32) -> Self {
        let context = driver().unwrap().context(ordinal).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Self {
            stream: context.stream(Priority::Normal).unwrap(),
            memory: context.alloc(ROOM).unwrap(),
            mapped: context.pinned(ROOM).unwrap(),
            stage: context.pinned(STAGE).unwrap(),
            used: 0,
            mapped_used: 0,
            kernels: KernelCache::new(folder.path()),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            context,
            _folder: folder,
        }
    }

    fn function(&mut self, name: &str, entry: &str) -> Function {
        if !self.functions.contains_key(entry) {
            let source = source(name).unwrap();
            let module = self.kernels.module(&self.context, source).unwrap();
            for entry in source.entries() {
                self.functions.insert((*entry).to_owned(), module.function(entry).unwrap());
            }
        }
        self.functions[entry].clone()
    }

    /// Where an address lies in mapped memory, if it does.
    fn in_mapped(&self, address: u64, bytes: usize) -> Option<*mut u8> {
        let offset = usize::try_from(address.checked_sub(self.mapped.device_ptr())?).ok()?;
        // SAFETY: the range lies within the buffer.
        (offset + bytes <= ROOM).then(|| unsafe { self.mapped.as_ptr().add(offset) })
    }

    fn queue(
        stream: &Stream,
        function: &Function,
        params: &impl Pod,
        launch: Launch,
    ) -> Result<(), kvoyant_cuda::CudaError> {
        // SAFETY: the cases give a kernel its own parameters, with addresses of what they uploaded and the launch that belongs to them.
        unsafe { stream.launch(function, launch.grid, launch.block, launch.shared_bytes, params) }
    }
}

/// The next piece of a buffer, at a multiple of 256.
fn take(used: &mut usize, bytes: usize) -> usize {
    let at = *used;
    *used = (at + bytes).next_multiple_of(256);
    assert!(*used <= ROOM, "a case needs more than {ROOM} bytes");
    at
}

impl Device for Card {
    fn upload(&mut self, bytes: &[u8]) -> u64 {
        let address = self.memory.ptr() + take(&mut self.used, bytes.len()) as u64;
        self.write(address, bytes);
        address
    }

    fn upload_mapped(&mut self, bytes: &[u8]) -> u64 {
        let address = self.mapped.device_ptr() + take(&mut self.mapped_used, bytes.len()) as u64;
        self.write(address, bytes);
        address
    }

    fn download(&mut self, address: u64, bytes: &mut [u8]) {
        if let Some(from) = self.in_mapped(address, bytes.len()) {
            // SAFETY: within the buffer, and no kernel runs.
            unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
            return;
        }
        for (i, piece) in bytes.chunks_mut(STAGE).enumerate() {
            let stage = self.stage.as_ptr();
            // SAFETY: the cases give addresses and lengths of what they uploaded; the stage is as large as the piece, and the copy has
            // ended when it is read.
            unsafe {
                self.stream.copy_d2h(stage, address + (i * STAGE) as u64, piece.len()).unwrap();
                self.stream.synchronize().unwrap();
                std::ptr::copy_nonoverlapping(stage, piece.as_mut_ptr(), piece.len());
            }
        }
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        if let Some(to) = self.in_mapped(address, bytes.len()) {
            // SAFETY: within the buffer, and no kernel runs.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            return;
        }
        for (i, piece) in bytes.chunks(STAGE).enumerate() {
            let stage = self.stage.as_ptr();
            // SAFETY: as in `download`; the stage is written again when the copy has ended.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), stage, piece.len());
                self.stream.copy_h2d(address + (i * STAGE) as u64, stage, piece.len()).unwrap();
            }
            self.stream.synchronize().unwrap();
        }
    }

    fn launch(&mut self, source: &str, entry: &str, params: &impl Pod, launch: Launch) {
        let function = self.function(source, entry);
        Self::queue(&self.stream, &function, params, launch).unwrap();
        self.stream.synchronize().unwrap();
    }

    fn replay(&mut self, source: &str, entry: &str, params: &impl Pod, launch: Launch) {
        let key = (entry.to_owned(), bytemuck::bytes_of(params).to_vec());
        if !self.graphs.contains_key(&key) {
            let function = self.function(source, entry);
            let graph = self.stream.capture(|stream| Self::queue(stream, &function, params, launch)).unwrap();
            self.graphs.insert(key.clone(), graph.instantiate().unwrap());
        }
        // SAFETY: the card keeps the kernel's module and all memory.
        unsafe { self.graphs[&key].launch(&self.stream) }.unwrap();
        self.stream.synchronize().unwrap();
    }
}

/// One test for each case.
macro_rules! on_a_card {
    ($($module:ident :: $case:ident),* $(,)?) => {
        $(
            #[test]
            fn $case() {
                let card = std::env::var(CARD).ok().map(|text| text.parse().expect("the number of a card"));
                if card.is_some() || on_softcuda(stringify!($case), &Machine::new()) {
                    cases::$module::$case(&mut Card::new(card.unwrap_or(0)));
                }
            }
        )*
    };
}

on_a_card! {
    copies::runs_of_every_length_and_alignment_are_gathered_byte_for_byte,
    copies::quantised_rows_are_read_as_the_cpu_reads_them,
    attention::paged_attention_is_that_of_the_cpu_for_every_storage_type_dimension_and_group,
    attention::a_table_whose_status_is_another_is_not_read,
    attention::runs_that_lead_outside_are_left_out_and_told,
    attention::splits_of_one_head_merge_to_the_whole,
    selection::scores_bounds_and_distances_are_those_of_the_cpu,
    selection::the_best_scores_are_chosen_exactly_as_on_the_cpu,
    codes::scores_and_margins_of_codes_are_those_of_the_cpu_to_the_last_bit,
    codes::what_codes_leave_out_is_summed_as_on_the_cpu,
    graph::a_captured_kernel_follows_residency_and_position_from_replay_to_replay,
    graph::reports_go_round_a_mailbox_and_say_which_they_are,
}
