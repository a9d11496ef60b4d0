//! One descriptor of the copy engine per run.

use kvoyant_cuda::{HostToDevice, Stream};

use super::{Batch, EngineError, EngineKind, TransferEngine};

/// The copy engine alone: no core copies, no multiprocessor runs. Each run costs a descriptor, so it suits long ones.
#[derive(Debug, Default)]
pub struct Dma {
    copies: Vec<HostToDevice>,
}

// SAFETY: the addresses are those of one call of `enqueue`, which leaves none behind.
unsafe impl Send for Dma {}

impl TransferEngine for Dma {
    fn kind(&self) -> EngineKind {
        EngineKind::Dma
    }

    fn enqueue(&mut self, batch: &Batch<'_>, stream: &Stream) -> Result<(), EngineError> {
        // The driver would copy memory that it does not know itself, and hold the caller up until it has.
        if let Some(piece) = batch.pieces.iter().find(|piece| piece.mapped.is_none()) {
            let (address, bytes) = (piece.src.addr(), piece.bytes);
            return Err(EngineError::Unregistered { engine: self.kind(), address, bytes });
        }
        self.copies.clear();
        self.copies.extend(batch.pieces.iter().map(|piece| HostToDevice {
            dst: piece.dst,
            src: piece.src,
            bytes: piece.bytes,
        }));
        // SAFETY: whoever made the batch promised that its sources and destinations are valid until all this has run.
        Ok(unsafe { stream.copy_batch_h2d(&self.copies) }?)
    }
}
