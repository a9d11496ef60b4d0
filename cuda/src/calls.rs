//! The driver's functions that this crate calls, each resolved by name before the first call.
//!
//! One list declares, resolves and names them, so that a driver which lacks one is a sentence at start and never a
//! panic in the middle of a request. The types are those of cudarc's bindings; the functions are resolved here and
//! return a plain `int`, because a driver newer than the bindings may answer with a code that their enum lacks, and
//! such a value must not come into being in Rust.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use cudarc::driver::sys;
use libloading::Library;

macro_rules! driver_calls {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        /// Every driver function that this crate calls.
        #[allow(non_snake_case)]
        pub(crate) struct Calls {
            $(pub(crate) $name: unsafe extern "C" fn($($argument: $kind),*) -> c_int,)*
            /// Keeps the functions mapped.
            _library: Library,
        }

        impl Calls {
            /// Resolves every function, or names the first that the library lacks.
            ///
            /// # Safety
            /// `library` is a CUDA driver: its functions have the signatures of `cuda.h`.
            pub(crate) unsafe fn resolve(library: Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the caller vouches for the signatures; the pointer is copied out and stays valid
                        // because the library is kept in the same struct.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument: $kind),*) -> c_int>(stringify!($name))
                        };
                        match found {
                            Ok(function) => *function,
                            Err(_) => return Err(stringify!($name)),
                        }
                    },)*
                    _library: library,
                })
            }
        }
    };
}

driver_calls! {
    cuInit(flags: c_uint);
    cuGetErrorName(error: c_int, name: *mut *const c_char);
    cuGetProcAddress_v2(symbol: *const c_char, function: *mut *mut c_void, version: c_int, flags: u64, status: *mut c_uint);

    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut sys::CUdevice, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: sys::CUdevice);
    cuDeviceGetUuid_v2(uuid: *mut sys::CUuuid, device: sys::CUdevice);
    cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: sys::CUdevice);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: sys::CUdevice);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: sys::CUdevice);

    cuDevicePrimaryCtxRetain(context: *mut sys::CUcontext, device: sys::CUdevice);
    cuDevicePrimaryCtxRelease_v2(device: sys::CUdevice);
    cuCtxGetCurrent(context: *mut sys::CUcontext);
    cuCtxSetCurrent(context: sys::CUcontext);
    cuCtxSynchronize();
    cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int);

    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(pointer: *mut sys::CUdeviceptr, bytes: usize);
    cuMemFree_v2(pointer: sys::CUdeviceptr);
    cuMemGetAddressRange_v2(base: *mut sys::CUdeviceptr, bytes: *mut usize, pointer: sys::CUdeviceptr);
    cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
    cuMemFreeHost(pointer: *mut c_void);
    cuMemHostRegister_v2(pointer: *mut c_void, bytes: usize, flags: c_uint);
    cuMemHostUnregister(pointer: *mut c_void);
    cuMemHostGetDevicePointer_v2(device: *mut sys::CUdeviceptr, host: *mut c_void, flags: c_uint);

    cuMemcpyHtoDAsync_v2(dst: sys::CUdeviceptr, src: *const c_void, bytes: usize, stream: sys::CUstream);
    cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    cuMemcpyDtoDAsync_v2(dst: sys::CUdeviceptr, src: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    cuMemsetD8Async(dst: sys::CUdeviceptr, value: u8, bytes: usize, stream: sys::CUstream);

    cuStreamCreateWithPriority(stream: *mut sys::CUstream, flags: c_uint, priority: c_int);
    cuStreamDestroy_v2(stream: sys::CUstream);
    cuStreamGetCtx(stream: sys::CUstream, context: *mut sys::CUcontext);
    cuStreamQuery(stream: sys::CUstream);
    cuStreamSynchronize(stream: sys::CUstream);
    cuStreamWaitEvent(stream: sys::CUstream, event: sys::CUevent, flags: c_uint);
    cuStreamWriteValue32_v2(stream: sys::CUstream, address: sys::CUdeviceptr, value: u32, flags: c_uint);
    cuStreamWriteValue64_v2(stream: sys::CUstream, address: sys::CUdeviceptr, value: u64, flags: c_uint);
    cuStreamWaitValue32_v2(stream: sys::CUstream, address: sys::CUdeviceptr, value: u32, flags: c_uint);
    cuStreamWaitValue64_v2(stream: sys::CUstream, address: sys::CUdeviceptr, value: u64, flags: c_uint);
    cuLaunchHostFunc(stream: sys::CUstream, function: sys::CUhostFn, data: *mut c_void);

    cuStreamBeginCapture_v2(stream: sys::CUstream, mode: c_uint);
    cuStreamEndCapture(stream: sys::CUstream, graph: *mut sys::CUgraph);
    cuStreamIsCapturing(stream: sys::CUstream, status: *mut c_uint);
    cuGraphInstantiateWithFlags(exec: *mut sys::CUgraphExec, graph: sys::CUgraph, flags: c_ulonglong);
    cuGraphLaunch(exec: sys::CUgraphExec, stream: sys::CUstream);
    cuGraphExecDestroy(exec: sys::CUgraphExec);
    cuGraphDestroy(graph: sys::CUgraph);

    cuEventCreate(event: *mut sys::CUevent, flags: c_uint);
    cuEventDestroy_v2(event: sys::CUevent);
    cuEventRecord(event: sys::CUevent, stream: sys::CUstream);
    cuEventQuery(event: sys::CUevent);
    cuEventSynchronize(event: sys::CUevent);
    cuEventElapsedTime(milliseconds: *mut f32, start: sys::CUevent, end: sys::CUevent);

    cuIpcGetEventHandle(handle: *mut sys::CUipcEventHandle, event: sys::CUevent);
    cuIpcOpenEventHandle(event: *mut sys::CUevent, handle: sys::CUipcEventHandle);
    cuIpcGetMemHandle(handle: *mut sys::CUipcMemHandle, pointer: sys::CUdeviceptr);
    cuIpcOpenMemHandle_v2(pointer: *mut sys::CUdeviceptr, handle: sys::CUipcMemHandle, flags: c_uint);
    cuIpcCloseMemHandle(pointer: sys::CUdeviceptr);

    cuMemGetAllocationGranularity(bytes: *mut usize, properties: *const sys::CUmemAllocationProp, option: c_uint);
    cuMemCreate(handle: *mut sys::CUmemGenericAllocationHandle, bytes: usize, properties: *const sys::CUmemAllocationProp, flags: c_ulonglong);
    cuMemRelease(handle: sys::CUmemGenericAllocationHandle);
    cuMemAddressReserve(pointer: *mut sys::CUdeviceptr, bytes: usize, alignment: usize, address: sys::CUdeviceptr, flags: c_ulonglong);
    cuMemAddressFree(pointer: sys::CUdeviceptr, bytes: usize);
    cuMemMap(pointer: sys::CUdeviceptr, bytes: usize, offset: usize, handle: sys::CUmemGenericAllocationHandle, flags: c_ulonglong);
    cuMemUnmap(pointer: sys::CUdeviceptr, bytes: usize);
    cuMemSetAccess(pointer: sys::CUdeviceptr, bytes: usize, access: *const sys::CUmemAccessDesc, count: usize);
    cuMemExportToShareableHandle(shareable: *mut c_void, handle: sys::CUmemGenericAllocationHandle, kind: c_uint, flags: c_ulonglong);
    cuMemImportFromShareableHandle(handle: *mut sys::CUmemGenericAllocationHandle, shareable: *mut c_void, kind: c_uint);

    cuModuleLoadData(module: *mut sys::CUmodule, image: *const c_void);
    cuModuleUnload(module: sys::CUmodule);
    cuModuleGetFunction(function: *mut sys::CUfunction, module: sys::CUmodule, name: *const c_char);
    cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: sys::CUfunction);
    cuFuncSetAttribute(function: sys::CUfunction, attribute: c_uint, value: c_int);
    cuLaunchKernel(
        function: sys::CUfunction,
        grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
        block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint, stream: sys::CUstream,
        parameters: *mut *mut c_void, extra: *mut *mut c_void
    );
}

/// Calls one driver function and turns its answer into a [`crate::CudaError`] that names it. Must stand in `unsafe`.
macro_rules! cu {
    ($calls:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let calls: &$crate::calls::Calls = $calls;
        let code = (calls.$name)($($argument),*);
        $crate::error::check(calls, stringify!($name), code)
    }};
}
pub(crate) use cu;

/// A handle of the driver, which threads may share: the driver's functions are thread-safe, and what a handle
/// stands for lives until the one owner destroys it.
pub(crate) struct Handle<T>(pub(crate) *mut T);

// SAFETY: the pointer is never dereferenced here, only handed to the driver, which locks for itself.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

/// Loads a library by name or path; the error is what the loader says, empty if there is no such file.
///
/// # Safety
/// The library's initialisers may be run at any time.
pub(crate) unsafe fn load_library(name: impl libloading::AsFilename) -> Result<Library, String> {
    // SAFETY: the caller's contract.
    unsafe { Library::new(name) }.map_err(|error| {
        // The loader's own words are one floor down.
        let text = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        if text.contains("No such file or directory") { String::new() } else { text }
    })
}
