//! What the driver answered, sorted by what the caller can do, with what the operator should do.

use std::ffi::{CStr, c_int};

use crate::calls::Calls;

/// A driver call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name} ({code}): {}", self.advice())]
pub struct CudaError {
    /// The driver function, or the check of ours, that refused.
    pub call: &'static str,
    /// The driver's code, `CUresult`.
    pub code: i32,
    /// The code's name, `CUDA_ERROR_…`.
    pub name: String,
}

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Device or pinned memory is short: refuse this one request, the others go on.
    OutOfMemory,
    /// Sticky: every later call in this process fails too, until the process is restarted.
    DeviceLost,
    /// The card, the driver or the platform cannot do this.
    NotSupported,
    /// Not finished yet.
    NotReady,
    /// An argument or a handle was wrong: a bug here, or a peer that lied.
    Invalid,
    /// There is no such device, or none is visible.
    NoDevice,
    /// Another process holds the device exclusively, or its compute mode forbids contexts.
    Exclusive,
    /// The process may not do this.
    NotPermitted,
    /// Anything else.
    Other,
}

/// The codes of `cuda.h` that are told apart, with what to do about each. Newer ones than the bindings know are here too.
mod code {
    pub(super) const INVALID_VALUE: i32 = 1;
    pub(super) const OUT_OF_MEMORY: i32 = 2;
    pub(super) const NOT_INITIALIZED: i32 = 3;
    pub(super) const DEINITIALIZED: i32 = 4;
    pub(super) const STUB_LIBRARY: i32 = 34;
    pub(super) const DEVICE_UNAVAILABLE: i32 = 46;
    pub(super) const NO_DEVICE: i32 = 100;
    pub(super) const INVALID_DEVICE: i32 = 101;
    pub(super) const DEVICE_NOT_LICENSED: i32 = 102;
    pub(super) const INVALID_IMAGE: i32 = 200;
    pub(super) const INVALID_CONTEXT: i32 = 201;
    pub(super) const MAP_FAILED: i32 = 205;
    pub(super) const NO_BINARY_FOR_GPU: i32 = 209;
    pub(super) const ECC_UNCORRECTABLE: i32 = 214;
    pub(super) const INVALID_PTX: i32 = 218;
    pub(super) const NVLINK_UNCORRECTABLE: i32 = 220;
    pub(super) const UNSUPPORTED_PTX_VERSION: i32 = 222;
    pub(super) const CONTAINED: i32 = 226;
    pub(super) const OPERATING_SYSTEM: i32 = 304;
    pub(super) const INVALID_HANDLE: i32 = 400;
    pub(super) const ILLEGAL_STATE: i32 = 401;
    pub(super) const NOT_FOUND: i32 = 500;
    pub(super) const NOT_READY: i32 = 600;
    pub(super) const ILLEGAL_ADDRESS: i32 = 700;
    pub(super) const LAUNCH_OUT_OF_RESOURCES: i32 = 701;
    pub(super) const LAUNCH_TIMEOUT: i32 = 702;
    pub(super) const CONTEXT_IS_DESTROYED: i32 = 709;
    pub(super) const ASSERT: i32 = 710;
    pub(super) const HOST_MEMORY_ALREADY_REGISTERED: i32 = 712;
    pub(super) const HOST_MEMORY_NOT_REGISTERED: i32 = 713;
    pub(super) const HARDWARE_STACK_ERROR: i32 = 714;
    pub(super) const LAUNCH_FAILED: i32 = 719;
    pub(super) const TENSOR_MEMORY_LEAK: i32 = 721;
    pub(super) const NOT_PERMITTED: i32 = 800;
    pub(super) const NOT_SUPPORTED: i32 = 801;
    pub(super) const SYSTEM_NOT_READY: i32 = 802;
    pub(super) const SYSTEM_DRIVER_MISMATCH: i32 = 803;
    pub(super) const COMPAT_NOT_SUPPORTED_ON_DEVICE: i32 = 804;
    pub(super) const MPS_CONNECTION_FAILED: i32 = 805;
    pub(super) const MPS_RPC_FAILURE: i32 = 806;
    pub(super) const MPS_MAX_CONNECTIONS_REACHED: i32 = 809;
    pub(super) const MPS_CLIENT_TERMINATED: i32 = 810;
    pub(super) const STREAM_CAPTURE_UNSUPPORTED: i32 = 900;
    pub(super) const STREAM_CAPTURE_WRONG_THREAD: i32 = 908;
    pub(super) const EXTERNAL_DEVICE: i32 = 911;
    pub(super) const UNKNOWN: i32 = 999;
}

impl CudaError {
    /// An error with a code of `cuda.h`, named from our own table: for checks made before the driver is asked.
    pub fn new(call: &'static str, code: i32) -> Self {
        Self {
            call,
            code,
            name: known_name(code).map_or_else(|| format!("CUDA_ERROR_{code}"), str::to_owned),
        }
    }

    /// An argument that the driver must not see.
    pub(crate) fn invalid(call: &'static str) -> Self {
        Self::new(call, code::INVALID_VALUE)
    }

    /// A handle that the driver must not see: the null stream above all.
    pub(crate) fn bad_handle(call: &'static str) -> Self {
        Self::new(call, code::INVALID_HANDLE)
    }

    /// Something that must not be recorded into a graph.
    pub(crate) fn not_in_capture(call: &'static str) -> Self {
        Self::new(call, code::STREAM_CAPTURE_UNSUPPORTED)
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self.code {
            code::OUT_OF_MEMORY => ErrorKind::OutOfMemory,
            // "Busy or unavailable" is a matter of the compute mode when a context is made, and a lost device later.
            code::DEVICE_UNAVAILABLE if self.call == "cuDevicePrimaryCtxRetain" => ErrorKind::Exclusive,
            code::DEVICE_UNAVAILABLE
            | code::ECC_UNCORRECTABLE
            | code::NVLINK_UNCORRECTABLE
            | code::CONTAINED
            | code::ILLEGAL_ADDRESS
            | code::LAUNCH_TIMEOUT
            | code::CONTEXT_IS_DESTROYED
            | code::ASSERT
            | code::HARDWARE_STACK_ERROR..=code::LAUNCH_FAILED
            | code::TENSOR_MEMORY_LEAK
            | code::MPS_RPC_FAILURE
            | code::MPS_CLIENT_TERMINATED
            | code::EXTERNAL_DEVICE => ErrorKind::DeviceLost,
            code::NOT_SUPPORTED
            | code::NO_BINARY_FOR_GPU
            | code::INVALID_PTX
            | code::UNSUPPORTED_PTX_VERSION
            | code::STREAM_CAPTURE_UNSUPPORTED
            | code::COMPAT_NOT_SUPPORTED_ON_DEVICE => ErrorKind::NotSupported,
            code::NOT_READY => ErrorKind::NotReady,
            code::NO_DEVICE | code::INVALID_DEVICE => ErrorKind::NoDevice,
            code::NOT_PERMITTED | code::DEVICE_NOT_LICENSED => ErrorKind::NotPermitted,
            code::INVALID_VALUE
            | code::INVALID_IMAGE
            | code::INVALID_CONTEXT
            | code::INVALID_HANDLE
            | code::ILLEGAL_STATE
            | code::NOT_FOUND
            | code::LAUNCH_OUT_OF_RESOURCES
            | code::HOST_MEMORY_ALREADY_REGISTERED
            | code::HOST_MEMORY_NOT_REGISTERED
            | 901..=code::STREAM_CAPTURE_WRONG_THREAD => ErrorKind::Invalid,
            _ => ErrorKind::Other,
        }
    }

    /// Whether every later call in this process will fail too.
    pub fn is_sticky(&self) -> bool {
        self.kind() == ErrorKind::DeviceLost
    }

    /// Whether the process is ending and the driver is gone already: nothing to release, nothing to say.
    pub(crate) fn is_shutdown(&self) -> bool {
        self.code == code::DEINITIALIZED
    }

    /// What whoever runs this machine should do, in one sentence.
    pub fn advice(&self) -> &'static str {
        if self.call == "cuIpcOpenEventHandle" && !self.is_sticky() {
            return "the event is not open to this process: both must share a /dev/shm and have different process ids; \
                    timeline words need neither";
        }
        if self.call == "cuIpcOpenMemHandle_v2" && !self.is_sticky() {
            return "the handle is not open to this process: a process cannot open its own handle, two processes must \
                    not share a process id across containers, and containers must share the IPC namespace; sharing \
                    by file descriptor needs none of this";
        }
        match self.code {
            code::OUT_OF_MEMORY if self.call.starts_with("cuMemHost") => {
                "no more host memory can be pinned: raise the memory limit (cgroup, RLIMIT_MEMLOCK) or lower the arena"
            }
            code::OUT_OF_MEMORY => {
                "device memory is used up: lower --slab or the device memory set aside, or see nvidia-smi for who holds it"
            }
            code::DEVICE_UNAVAILABLE if self.kind() == ErrorKind::Exclusive => {
                "another process holds the card, or its compute mode forbids contexts: set it to the default with \
                 nvidia-smi -c 0"
            }
            code::NO_DEVICE => {
                "no device is visible: see nvidia-smi -L and CUDA_VISIBLE_DEVICES, and give the container the GPU"
            }
            code::INVALID_DEVICE => {
                "there is no device of that number: see nvidia-smi -L; a MIG instance is chosen by its UUID in \
                 CUDA_VISIBLE_DEVICES"
            }
            code::SYSTEM_DRIVER_MISMATCH => {
                "the driver library and the kernel module differ: reboot, or reload the nvidia modules after the update"
            }
            code::COMPAT_NOT_SUPPORTED_ON_DEVICE => {
                "the forward-compatibility package does not serve this card: take it off LD_LIBRARY_PATH or update the driver"
            }
            code::SYSTEM_NOT_READY => {
                "the system's services are not up: start nvidia-fabricmanager and nvidia-persistenced"
            }
            code::STUB_LIBRARY => {
                "a toolkit's stub stands in front of the driver: take …/stubs off LD_LIBRARY_PATH"
            }
            code::NOT_INITIALIZED | code::DEINITIALIZED => "the driver is not up, or the process is ending",
            code::MPS_CONNECTION_FAILED..=code::MPS_MAX_CONNECTIONS_REACHED => {
                "the MPS server does not serve this process: look at its log, at CUDA_MPS_PIPE_DIRECTORY, and that \
                 both run as the same user"
            }
            code::ECC_UNCORRECTABLE | code::NVLINK_UNCORRECTABLE | code::CONTAINED => {
                "the hardware reported an uncorrectable error: look for Xid in dmesg, drain the card, and restart the process"
            }
            _ if self.is_sticky() => {
                "the device is lost to this process: look for Xid in dmesg and restart the process; host copies are safe"
            }
            code::NOT_PERMITTED | code::DEVICE_NOT_LICENSED => {
                "this process may not do that: see the permissions of /dev/nvidia*, the container's capabilities and the licence"
            }
            code::MAP_FAILED | code::OPERATING_SYSTEM => {
                "the operating system refused: see ulimit -n and -l, the container's devices and dmesg"
            }
            code::NO_BINARY_FOR_GPU
            | code::INVALID_PTX
            | code::UNSUPPORTED_PTX_VERSION
            | code::INVALID_IMAGE => {
                "the kernels were compiled for another card or by a newer toolkit than the driver knows: empty the \
                 kernel cache, or take an NVRTC no newer than the driver"
            }
            code::NOT_SUPPORTED => "the card or its driver cannot do this: kvoyant doctor says what it can",
            code::HOST_MEMORY_ALREADY_REGISTERED => "this host memory is pinned already",
            code::HOST_MEMORY_NOT_REGISTERED => "this host memory is not pinned",
            code::NOT_READY => "not finished yet",
            code::STREAM_CAPTURE_UNSUPPORTED..=code::STREAM_CAPTURE_WRONG_THREAD => {
                "this cannot be recorded into a graph, or the capture was spoilt before: end it and capture again"
            }
            code::LAUNCH_OUT_OF_RESOURCES => {
                "the kernel wants more threads or shared memory than the card has"
            }
            _ => match self.kind() {
                ErrorKind::Invalid => "an argument or a handle was wrong: please report it with the log",
                _ => "look at dmesg and the driver's documentation",
            },
        }
    }
}

/// The names of the codes that our own checks and advice speak of.
fn known_name(code: i32) -> Option<&'static str> {
    Some(match code {
        code::INVALID_VALUE => "CUDA_ERROR_INVALID_VALUE",
        code::OUT_OF_MEMORY => "CUDA_ERROR_OUT_OF_MEMORY",
        code::NOT_INITIALIZED => "CUDA_ERROR_NOT_INITIALIZED",
        code::DEINITIALIZED => "CUDA_ERROR_DEINITIALIZED",
        code::DEVICE_UNAVAILABLE => "CUDA_ERROR_DEVICE_UNAVAILABLE",
        code::NO_DEVICE => "CUDA_ERROR_NO_DEVICE",
        code::INVALID_DEVICE => "CUDA_ERROR_INVALID_DEVICE",
        code::INVALID_CONTEXT => "CUDA_ERROR_INVALID_CONTEXT",
        code::ECC_UNCORRECTABLE => "CUDA_ERROR_ECC_UNCORRECTABLE",
        code::INVALID_HANDLE => "CUDA_ERROR_INVALID_HANDLE",
        code::NOT_FOUND => "CUDA_ERROR_NOT_FOUND",
        code::NOT_READY => "CUDA_ERROR_NOT_READY",
        code::ILLEGAL_ADDRESS => "CUDA_ERROR_ILLEGAL_ADDRESS",
        code::LAUNCH_FAILED => "CUDA_ERROR_LAUNCH_FAILED",
        code::NOT_PERMITTED => "CUDA_ERROR_NOT_PERMITTED",
        code::NOT_SUPPORTED => "CUDA_ERROR_NOT_SUPPORTED",
        code::STREAM_CAPTURE_UNSUPPORTED => "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        code::UNKNOWN => "CUDA_ERROR_UNKNOWN",
        _ => return None,
    })
}

/// Turns the driver's answer to `call` into a result.
pub(crate) fn check(calls: &Calls, call: &'static str, code: c_int) -> Result<(), CudaError> {
    if code == 0 {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: `name` is written with a pointer to a string constant of the driver, or left null for an unknown code.
    let answer = unsafe { (calls.cuGetErrorName)(code, &raw mut name) };
    if answer != 0 || name.is_null() {
        return Err(CudaError::new(call, code));
    }
    // SAFETY: the driver's names are NUL-terminated constants.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    Err(CudaError { call, code, name })
}

/// For [`Drop`]: a release that failed is said once and never panics.
pub(crate) fn released(result: Result<(), CudaError>) {
    match result {
        Ok(()) => {}
        // At exit the driver may have torn itself down before our statics go.
        Err(error) if error.is_shutdown() => tracing::trace!(%error, "the driver is gone already"),
        Err(error) => tracing::warn!(%error, "a CUDA resource could not be released"),
    }
}

/// Whether a query said "not yet", which is no error.
pub(crate) fn ready(result: Result<(), CudaError>) -> Result<bool, CudaError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotReady => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sticky_error_is_a_lost_device_and_no_other_is() {
        for code in [46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 806, 810, 911]
        {
            assert!(CudaError::new("cuStreamSynchronize", code).is_sticky(), "{code}");
        }
        for code in [1, 2, 100, 201, 209, 400, 500, 600, 701, 712, 713, 720, 800, 801, 900, 901, 908, 999] {
            assert!(!CudaError::new("cuStreamSynchronize", code).is_sticky(), "{code}");
        }
    }

    #[test]
    fn an_error_says_what_the_operator_should_do() {
        let cases = [
            ("cuMemAlloc_v2", 2, ErrorKind::OutOfMemory, "--slab"),
            ("cuMemHostRegister_v2", 2, ErrorKind::OutOfMemory, "RLIMIT_MEMLOCK"),
            ("cuDevicePrimaryCtxRetain", 46, ErrorKind::Exclusive, "nvidia-smi -c 0"),
            ("cuStreamSynchronize", 46, ErrorKind::DeviceLost, "restart the process"),
            ("cuStreamSynchronize", 214, ErrorKind::DeviceLost, "Xid"),
            ("cuDeviceGet", 101, ErrorKind::NoDevice, "MIG"),
            ("cuIpcOpenMemHandle_v2", 201, ErrorKind::Invalid, "its own handle"),
            ("cuIpcOpenEventHandle", 1, ErrorKind::Invalid, "/dev/shm"),
            ("cuModuleLoadData", 209, ErrorKind::NotSupported, "kernel cache"),
            ("cuInit", 803, ErrorKind::Other, "reload the nvidia modules"),
            ("cuInit", 805, ErrorKind::Other, "MPS"),
            ("cuInit", 34, ErrorKind::Other, "stub"),
            ("cuMemMap", 800, ErrorKind::NotPermitted, "/dev/nvidia"),
            ("cuStreamBeginCapture_v2", 906, ErrorKind::Invalid, "capture again"),
        ];
        for (call, code, kind, part) in cases {
            let error = CudaError::new(call, code);
            assert_eq!(error.kind(), kind, "{error}");
            let text = error.to_string();
            assert!(text.starts_with(call) && text.contains(part), "{text:?} does not say {part:?}");
            assert!(!text.contains("  ") && !text.contains('\n'), "{text:?} is one sentence");
        }
    }

    #[test]
    fn a_code_of_a_newer_driver_is_carried_as_it_is() {
        let error = CudaError::new("cuLaunchKernel", 4321);
        assert_eq!((error.code, error.kind()), (4321, ErrorKind::Other));
        assert_eq!(error.name, "CUDA_ERROR_4321");
    }
}
