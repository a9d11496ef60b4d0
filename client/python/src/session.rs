//! A session with its model: what every other object belongs to.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use kvoyant_client::{Error, Mode, Model, ModelSpec, RowLayout};
use kvoyant_methods::Needs;
use rayon::ThreadPool;

use crate::answer::Answered;
use crate::errors::{Result, Wrong};
use crate::owned::{Owned, same_process};
use crate::request::Asked;
use crate::sequence::Kept;

/// A registered model, until it is closed.
#[derive(Debug)]
pub(crate) struct Session {
    process: u32,
    model: RwLock<Option<Owned<Model>>>,
    pub(crate) spec: ModelSpec,
    pub(crate) layout: RowLayout,
    pub(crate) row_bytes: usize,
    pub(crate) page_rows: usize,
    pub(crate) mode: Mode,
    pub(crate) spills: bool,
    /// Of each method.
    pub(crate) needs: Vec<Needs>,
    pub(crate) number: u64,
    pub(crate) protocol: (u32, u16),
    pub(crate) device: String,
    objects: Mutex<Objects>,
    /// Threads of this process: a child has none of its parent's.
    pool: OnceLock<Owned<ThreadPool>>,
}

/// What was made of it and may still be open.
#[derive(Debug, Default)]
struct Objects {
    sequences: Vec<Weak<Kept>>,
    asked: Vec<Weak<Asked>>,
    answers: Vec<Weak<Answered>>,
}

fn keep<T>(list: &mut Vec<Weak<T>>, object: &Arc<T>) {
    if list.len() == list.capacity() {
        list.retain(|other| other.strong_count() > 0);
    }
    list.push(Arc::downgrade(object));
}

impl Session {
    pub(crate) fn new(model: Model, needs: Vec<Needs>, number: u64, protocol: (u32, u16)) -> Self {
        Self {
            process: std::process::id(),
            spec: model.spec().clone(),
            layout: model.layout(),
            row_bytes: model.layout().row_bytes().unwrap_or(0),
            page_rows: model.page_rows(),
            mode: model.mode(),
            spills: model.spills(),
            needs,
            number,
            protocol,
            device: model.device().to_owned(),
            model: RwLock::new(Some(Owned::new(model))),
            objects: Mutex::default(),
            pool: OnceLock::new(),
        }
    }

    /// Checks that `what`, which belongs to it, is used where it was made.
    pub(crate) fn here(&self, what: &str) -> Result<()> {
        same_process(self.process, what)
    }

    /// The model, if it is open and of this process.
    pub(crate) fn model(&self) -> Result<Model> {
        self.here("model")?;
        let model = self.model.read().unwrap_or_else(PoisonError::into_inner);
        model.as_ref().map(|model| Model::clone(model)).ok_or_else(|| Wrong::closed("model"))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.model().is_ok()
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.spec.kv_heads as usize
    }

    pub(crate) fn query_heads(&self) -> usize {
        self.spec.query_heads as usize
    }

    /// Checks the index of a layer.
    pub(crate) fn layer(&self, layer: usize) -> Result<usize> {
        let layers = self.spec.layers as usize;
        if layer < layers {
            return Ok(layer);
        }
        Err(Wrong::argument(format!("layer {layer} of a model of {layers}")))
    }

    /// Checks the index of a KV head.
    pub(crate) fn kv_head(&self, kv_head: usize) -> Result<usize> {
        if kv_head < self.kv_heads() {
            return Ok(kv_head);
        }
        Err(Wrong::argument(format!("KV head {kv_head} of a model of {}", self.kv_heads())))
    }

    /// Checks the index of a method.
    pub(crate) fn method(&self, method: usize) -> Result<usize> {
        let methods = self.spec.methods.len();
        if method < methods {
            return Ok(method);
        }
        Err(Wrong::argument(format!("method {method} of a model that registered {methods}")))
    }

    /// Whether the daemon selects rows of a layer.
    pub(crate) fn selects(&self, layer: usize) -> bool {
        layer >= self.spec.dense_layers as usize && !self.spec.sliding_layers.contains(&(layer as u32))
    }

    /// Threads to attend with.
    pub(crate) fn pool(&self) -> Result<&ThreadPool> {
        if let Some(pool) = self.pool.get() {
            return Ok(pool);
        }
        let pool = rayon::ThreadPoolBuilder::new().thread_name(|i| format!("kvoyant-{i}")).build();
        let pool = pool.map_err(|error| Wrong::from(Error::Io(std::io::Error::other(error))))?;
        Ok(self.pool.get_or_init(|| Owned::new(pool)))
    }

    fn objects(&self) -> std::sync::MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn keep_sequence(&self, kept: &Arc<Kept>) {
        keep(&mut self.objects().sequences, kept);
    }

    pub(crate) fn keep_asked(&self, asked: &Arc<Asked>) {
        keep(&mut self.objects().asked, asked);
    }

    pub(crate) fn keep_answer(&self, answered: &Arc<Answered>) {
        keep(&mut self.objects().answers, answered);
    }

    /// Ends the session: requests are given up, answers released, sequences closed. What views show stays until they are gone.
    pub(crate) fn close(&self) -> Result<()> {
        self.here("model")?;
        let Some(model) = self.model.write().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        let Objects { sequences, asked, answers } = std::mem::take(&mut *self.objects());
        asked.iter().filter_map(Weak::upgrade).for_each(|asked| drop(asked.take()));
        answers.iter().filter_map(Weak::upgrade).for_each(|answered| answered.release());
        let idle: Vec<_> =
            sequences.iter().filter_map(Weak::upgrade).filter_map(|kept| kept.take_if_idle()).collect();
        match model.into_inner().close(idle) {
            // There is nobody left to close them for.
            Err(Error::DaemonGone) => Ok(()),
            closed => Ok(closed?),
        }
    }
}
