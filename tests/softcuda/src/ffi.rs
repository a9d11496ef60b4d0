//! The border to C: result codes, and pointer parameters that are checked where they are used.
//!
//! Exported functions take [`Out`] and [`In`] in place of raw pointers. Both are pointers to C; only C callers make
//! them, and by calling the driver they promise what its documentation asks of them: null, or good for one value.

use std::ffi::{CStr, c_char};

/// A `CUresult` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u32);

/// What every call of the driver comes to inside.
pub(crate) type Outcome<T = ()> = Result<T, Code>;

impl Code {
    pub(crate) const INVALID_VALUE: Self = Self(1);
    pub(crate) const OUT_OF_MEMORY: Self = Self(2);
    pub(crate) const NOT_INITIALIZED: Self = Self(3);
    pub(crate) const DEVICE_UNAVAILABLE: Self = Self(46);
    pub(crate) const NO_DEVICE: Self = Self(100);
    pub(crate) const INVALID_DEVICE: Self = Self(101);
    pub(crate) const INVALID_IMAGE: Self = Self(200);
    pub(crate) const INVALID_CONTEXT: Self = Self(201);
    pub(crate) const MAP_FAILED: Self = Self(205);
    pub(crate) const NO_BINARY_FOR_GPU: Self = Self(209);
    pub(crate) const ECC_UNCORRECTABLE: Self = Self(214);
    pub(crate) const PEER_ACCESS_UNSUPPORTED: Self = Self(217);
    pub(crate) const OPERATING_SYSTEM: Self = Self(304);
    pub(crate) const INVALID_HANDLE: Self = Self(400);
    pub(crate) const ILLEGAL_STATE: Self = Self(401);
    pub(crate) const NOT_FOUND: Self = Self(500);
    pub(crate) const NOT_READY: Self = Self(600);
    pub(crate) const ILLEGAL_ADDRESS: Self = Self(700);
    pub(crate) const CONTEXT_IS_DESTROYED: Self = Self(709);
    pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: Self = Self(712);
    pub(crate) const HOST_MEMORY_NOT_REGISTERED: Self = Self(713);
    pub(crate) const LAUNCH_FAILED: Self = Self(719);
    pub(crate) const NOT_PERMITTED: Self = Self(800);
    pub(crate) const NOT_SUPPORTED: Self = Self(801);
    pub(crate) const STREAM_CAPTURE_UNSUPPORTED: Self = Self(900);
    pub(crate) const STREAM_CAPTURE_INVALIDATED: Self = Self(901);
    pub(crate) const STREAM_CAPTURE_ISOLATION: Self = Self(905);
    pub(crate) const CAPTURED_EVENT: Self = Self(907);
    pub(crate) const STREAM_CAPTURE_WRONG_THREAD: Self = Self(908);
}

/// The number that C sees.
pub(crate) fn status(outcome: Outcome) -> u32 {
    match outcome {
        Ok(()) => 0,
        Err(code) => code.0,
    }
}

/// A pointer that the driver writes one value to.
#[repr(transparent)]
#[derive(Debug)]
pub(crate) struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Out<T> {}

impl<T> Out<T> {
    /// Writes the value; a null pointer is an invalid value.
    pub(crate) fn set(self, value: T) -> Outcome {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so the caller gave room for one value (the module's contract).
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// What is there already.
    pub(crate) fn get(self) -> Outcome<T>
    where
        T: Copy,
    {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the call is one that takes a value as well as gives one.
        Ok(unsafe { self.0.read_unaligned() })
    }

    /// Writes the value if there is room for it.
    pub(crate) fn offer(self, value: T) {
        let _ = self.set(value);
    }

    /// Whether the caller gave no room.
    pub(crate) fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// The same pointer as one to another type.
    pub(crate) fn cast<U>(self) -> Out<U> {
        Out(self.0.cast())
    }
}

impl Out<c_char> {
    /// Writes a text that ends in a zero, cut to `room` bytes.
    pub(crate) fn set_text(self, text: &str, room: usize) -> Outcome {
        if self.0.is_null() || room == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let kept = &text.as_bytes()[..text.len().min(room - 1)];
        // SAFETY: not null, and the caller gave `room` bytes; one is left for the zero.
        unsafe {
            self.0.cast::<u8>().copy_from_nonoverlapping(kept.as_ptr(), kept.len());
            self.0.add(kept.len()).write(0);
        }
        Ok(())
    }

    /// Writes bytes as they are.
    pub(crate) fn set_bytes(self, bytes: &[u8]) -> Outcome {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the caller asked for the length before it gave room for as much.
        unsafe { self.0.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }
}

/// A pointer that the driver reads values from.
#[repr(transparent)]
#[derive(Debug)]
pub(crate) struct In<T>(*const T);

impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for In<T> {}

impl<T: Copy> In<T> {
    /// The value; a null pointer is an invalid value.
    pub(crate) fn get(self) -> Outcome<T> {
        self.at(0)
    }

    /// The value at an index that the caller's count allows.
    pub(crate) fn at(self, index: usize) -> Outcome<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so the caller gave as many values as its count says, and `index` is below that.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }
}

impl<T> In<T> {
    /// Whether the caller gave nothing.
    pub(crate) fn is_null(self) -> bool {
        self.0.is_null()
    }
}

impl In<c_char> {
    /// The text; null or not UTF-8 is an invalid value.
    pub(crate) fn text(self) -> Outcome<&'static str> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, so the caller gave a text that ends in a zero and outlives the call; nothing keeps it longer.
        unsafe { CStr::from_ptr(self.0) }.to_str().map_err(|_| Code::INVALID_VALUE)
    }
}

impl In<u8> {
    /// The bytes there.
    ///
    /// # Safety
    /// As many bytes must be readable at the address, and stay as they are while the slice is used.
    pub(crate) unsafe fn bytes<'a>(self, count: usize) -> &'a [u8] {
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts(self.0, count) }
    }
}
