//! Compiled kernels, loaded into a context.

use std::ffi::{CString, c_int, c_uint};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::calls::{Handle, cu};
use crate::context::Context;
use crate::error::{CudaError, released};

/// A loaded image.
#[derive(Clone)]
pub struct Module(Arc<Inner>);

struct Inner {
    context: Context,
    raw: Handle<sys::CUmod_st>,
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module").field("raw", &self.0.raw.0).field("context", &self.0.context).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: loaded once and unloaded once; every function holds a clone.
        let result = self
            .context
            .enter_to_release()
            .and_then(|_entered| unsafe { cu!(self.context.calls(), cuModuleUnload(self.raw.0)) });
        released(result);
    }
}

/// A kernel of a [`Module`], which it keeps loaded.
#[derive(Clone)]
pub struct Function {
    module: Module,
    raw: Arc<Handle<sys::CUfunc_st>>,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("raw", &self.raw.0).field("module", &self.module).finish()
    }
}

impl Context {
    /// Loads a compiled image (cubin, or PTX with its terminating NUL).
    ///
    /// The driver takes no length, so an image must be whole: [`crate::KernelCache`] checks its own. What cannot be an
    /// image at all is refused here.
    pub fn load_module(&self, image: &[u8]) -> Result<Module, CudaError> {
        const ELF: &[u8] = b"\x7fELF";
        if !(image.starts_with(ELF) && image.len() >= 64 || image.last() == Some(&0)) {
            return Err(CudaError::new("cuModuleLoadData", 200));
        }
        let _entered = self.enter()?;
        let mut raw: sys::CUmodule = std::ptr::null_mut();
        // SAFETY: the image is a whole ELF file or text that ends in NUL; `raw` is ours to be written.
        unsafe { cu!(self.calls(), cuModuleLoadData(&raw mut raw, image.as_ptr().cast())) }?;
        Ok(Module(Arc::new(Inner { context: self.clone(), raw: Handle(raw) })))
    }
}

impl Module {
    /// The kernel of this name.
    pub fn function(&self, name: &str) -> Result<Function, CudaError> {
        let c_name = CString::new(name).map_err(|_| CudaError::invalid("cuModuleGetFunction"))?;
        let context = &self.0.context;
        let _entered = context.enter()?;
        let mut raw: sys::CUfunction = std::ptr::null_mut();
        // SAFETY: `raw` is ours to be written, and the name ends in NUL.
        unsafe { cu!(context.calls(), cuModuleGetFunction(&raw mut raw, self.0.raw.0, c_name.as_ptr())) }?;
        Ok(Function { module: self.clone(), raw: Arc::new(Handle(raw)) })
    }
}

impl Function {
    pub(crate) fn handle(&self) -> sys::CUfunction {
        self.raw.0
    }

    /// Threads that one block of it may have at most, by its registers.
    pub fn max_threads_per_block(&self) -> Result<u32, CudaError> {
        let context = &self.module.0.context;
        let _entered = context.enter()?;
        let mut value: c_int = 0;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK as c_uint;
        // SAFETY: `value` is ours to be written, and the module is loaded.
        unsafe { cu!(context.calls(), cuFuncGetAttribute(&raw mut value, attribute, self.handle())) }?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Allows launches with this much dynamic shared memory; needed above 48 KiB.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        let context = &self.module.0.context;
        let value = c_int::try_from(bytes).map_err(|_| CudaError::invalid("cuFuncSetAttribute"))?;
        let _entered = context.enter()?;
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
        // SAFETY: the module is loaded; the driver checks the value.
        unsafe { cu!(context.calls(), cuFuncSetAttribute(self.handle(), attribute, value)) }
    }
}
