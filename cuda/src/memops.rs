//! Timeline words: what a stream writes when it has come so far, and what another waits for.

use std::ffi::c_uint;

use cudarc::driver::sys;

use crate::calls::cu;
use crate::error::CudaError;
use crate::stream::Stream;

const WRITE: c_uint = sys::CUstreamWriteValue_flags_enum::CU_STREAM_WRITE_VALUE_DEFAULT as c_uint;
/// At least, compared cyclically: (word − value) as a signed number is not negative.
const AT_LEAST: c_uint = sys::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as c_uint;

impl Stream {
    /// Writes a 32-bit word when the stream comes here; what was queued before is visible to whoever sees it.
    ///
    /// # Safety
    /// `addr` is a device address of a word that lives until then, aligned to 4 bytes.
    pub unsafe fn write_value32(&self, addr: u64, value: u32) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the address.
        unsafe { cu!(calls, cuStreamWriteValue32_v2(self.handle(), addr, value, WRITE)) }
    }

    /// Writes a 64-bit word when the stream comes here ([`crate::Abilities::memops_64`]).
    ///
    /// # Safety
    /// `addr` is a device address of a word that lives until then, aligned to 8 bytes.
    pub unsafe fn write_value64(&self, addr: u64, value: u64) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the address.
        unsafe { cu!(calls, cuStreamWriteValue64_v2(self.handle(), addr, value, WRITE)) }
    }

    /// Holds the stream until a 32-bit word is at least `at_least`, compared cyclically: half the range is ahead.
    ///
    /// A producer that dies leaves the stream waiting for ever: a watchdog must write the word.
    ///
    /// # Safety
    /// As [`Self::write_value32`].
    pub unsafe fn wait_value32(&self, addr: u64, at_least: u32) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the address.
        unsafe { cu!(calls, cuStreamWaitValue32_v2(self.handle(), addr, at_least, AT_LEAST)) }
    }

    /// Holds the stream until a 64-bit word is at least `at_least`, compared cyclically.
    ///
    /// # Safety
    /// As [`Self::write_value64`].
    pub unsafe fn wait_value64(&self, addr: u64, at_least: u64) -> Result<(), CudaError> {
        let (calls, _entered) = self.enter()?;
        // SAFETY: the caller vouches for the address.
        unsafe { cu!(calls, cuStreamWaitValue64_v2(self.handle(), addr, at_least, AT_LEAST)) }
    }
}
