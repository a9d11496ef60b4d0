//! The table of handles. A handle is a number: a place in the table, how often the place was used before, and which process made it.
//!
//! Whatever a caller does with a number, it finds the object that it was given for, or a sentence that says why not. An object that is
//! closed while another thread is inside a call on it lives until that call ends.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use crate::answer::Answered;
use crate::model::Session;
use crate::request::Asked;
use crate::sequence::Kept;
use crate::status::Wrong;
use crate::types::kvoyant_status;

/// Bits of a handle: place, generation of the place, generation of the process.
const PLACE_BITS: u32 = 24;
const GENERATION_BITS: u32 = 32;

/// What a handle is for.
#[derive(Debug, Clone)]
pub(crate) enum Object {
    Model(Arc<Session>),
    Sequence(Arc<Kept>),
    Pending(Arc<Asked>),
    Ready(Arc<Answered>),
}

impl Object {
    fn name(&self) -> &'static str {
        match self {
            Self::Model(_) => "a model",
            Self::Sequence(_) => "a sequence",
            Self::Pending(_) => "a request under way",
            Self::Ready(_) => "an answer",
        }
    }

    /// Handle of the model that it belongs to, if it is none.
    fn owner(&self) -> Option<u64> {
        match self {
            Self::Model(_) => None,
            Self::Sequence(kept) => Some(kept.model),
            Self::Pending(asked) => Some(asked.model),
            Self::Ready(answered) => Some(answered.model),
        }
    }
}

/// A kind of object, by its Rust type.
pub(crate) trait Kind: Sized {
    /// What it is called.
    const NAME: &'static str;
    /// The object, if it is of this kind.
    fn of(object: &Object) -> Option<&Arc<Self>>;
}

macro_rules! kind {
    ($type:ty, $variant:ident, $name:literal) => {
        impl Kind for $type {
            const NAME: &'static str = $name;
            fn of(object: &Object) -> Option<&Arc<Self>> {
                match object {
                    Object::$variant(this) => Some(this),
                    _ => None,
                }
            }
        }
    };
}

kind!(Session, Model, "model");
kind!(Kept, Sequence, "sequence");
kind!(Asked, Pending, "request under way");
kind!(Answered, Ready, "answer");

#[derive(Debug, Default)]
struct Place {
    /// Of the object that is here, or of the last one that was.
    generation: u32,
    object: Option<Object>,
}

#[derive(Debug, Default)]
struct Table {
    places: Vec<Place>,
    free: Vec<usize>,
}

/// A process's table. A child begins with one of its own: the locks of its parent's may be held for ever, by threads that it does not have.
#[derive(Debug)]
struct Own {
    process: u64,
    table: RwLock<Table>,
    /// Its parent's, which is left as it is: to take it apart would close the parent's sequences. Kept, so that nobody takes it for lost.
    _parent: Option<&'static Own>,
}

/// The table that was used last, of this process or of one that it was forked from.
static TABLE: AtomicPtr<Own> = AtomicPtr::new(ptr::null_mut());

/// How many forks lie between the process that loaded the library and this one.
static PROCESS: AtomicU64 = AtomicU64::new(0);

extern "C" fn in_child() {
    PROCESS.fetch_add(1, Ordering::Relaxed);
}

/// Has children of this process know that they are.
///
/// # Errors
/// If the system has no memory for that.
pub(crate) fn watch_forks() -> Result<(), Wrong> {
    static WATCHED: OnceLock<i32> = OnceLock::new();
    let failed = *WATCHED.get_or_init(|| {
        // SAFETY: `in_child` only counts in an atomic, which is all that a child of a process with threads may do.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) }
    });
    if failed == 0 {
        return Ok(());
    }
    let error = std::io::Error::from_raw_os_error(failed);
    Err(Wrong::new(kvoyant_status::System, format!("fork(2) cannot be watched: {error}")))
}

fn table() -> &'static RwLock<Table> {
    let process = PROCESS.load(Ordering::Relaxed);
    loop {
        let last = TABLE.load(Ordering::Acquire);
        // SAFETY: what is stored in TABLE came from a box and is never freed.
        let own = unsafe { last.as_ref() };
        if let Some(own) = own.filter(|own| own.process == process) {
            return &own.table;
        }
        let new = Box::into_raw(Box::new(Own { process, table: RwLock::default(), _parent: own }));
        if TABLE.compare_exchange(last, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `new` came from a box just now, and nobody else has seen it.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

fn process() -> u64 {
    PROCESS.load(Ordering::Relaxed) & 0xff
}

fn split(handle: u64) -> (usize, u32, u64) {
    let place = handle & ((1 << PLACE_BITS) - 1);
    (place as usize, (handle >> PLACE_BITS) as u32, handle >> (PLACE_BITS + GENERATION_BITS))
}

/// Puts an object into the table.
///
/// # Errors
/// If there are 2²⁴ already.
pub(crate) fn add(object: Object) -> Result<u64, Wrong> {
    let mut table = table().write().unwrap_or_else(PoisonError::into_inner);
    let place = match table.free.pop() {
        Some(place) => place,
        None if table.places.len() >> PLACE_BITS != 0 => {
            return Err(Wrong::new(
                kvoyant_status::Backpressure,
                "16777216 handles are open in this process; close some",
            ));
        }
        None => {
            table.places.push(Place::default());
            table.places.len() - 1
        }
    };
    let Place { generation, object: here } = &mut table.places[place];
    *generation += 1;
    *here = Some(object);
    let generation = u64::from(*generation);
    Ok(process() << (PLACE_BITS + GENERATION_BITS) | generation << PLACE_BITS | place as u64)
}

/// Checks what can be told from the number alone.
fn check(handle: u64, name: &str) -> Result<(usize, u32), Wrong> {
    let (place, generation, made_in) = split(handle);
    if handle == 0 {
        return Err(Wrong::new(
            kvoyant_status::Handle,
            format!("the {name} is all zero: it was never opened, or what opened it failed"),
        ));
    }
    if made_in != process() {
        return Err(Wrong::new(
            kvoyant_status::Forked,
            format!(
                "the {name} belongs to the parent of this process: after fork(2) a child has no session; connect in the child, or \
                 connect after the fork"
            ),
        ));
    }
    Ok((place, generation))
}

fn unknown(handle: u64, name: &str, place: Option<&Place>, generation: u32) -> Wrong {
    let text = match place {
        Some(place) if (1..=place.generation).contains(&generation) => format!(
            "the {name} (handle {handle:#x}) was closed or released before, by itself or with its model; use one that is open"
        ),
        _ => format!("{handle:#x} is no handle that this library gave out"),
    };
    Wrong::new(kvoyant_status::Handle, text)
}

/// The object of a handle.
///
/// # Errors
/// That it was closed, is of another kind, or of a parent process.
pub(crate) fn get<K: Kind>(handle: u64) -> Result<Arc<K>, Wrong> {
    let (at, generation) = check(handle, K::NAME)?;
    let table = table().read().unwrap_or_else(PoisonError::into_inner);
    let place = table.places.get(at);
    match place {
        Some(Place { generation: here, object: Some(object) }) if *here == generation => {
            K::of(object).cloned().ok_or_else(|| other_kind(object, K::NAME))
        }
        _ => Err(unknown(handle, K::NAME, place, generation)),
    }
}

fn other_kind(object: &Object, wanted: &str) -> Wrong {
    Wrong::new(
        kvoyant_status::Handle,
        format!("the handle is of {}, and that of a {wanted} is needed", object.name()),
    )
}

/// Takes an object out of the table: from now on its handle is stale.
///
/// # Errors
/// As for [`get`].
pub(crate) fn take<K: Kind>(handle: u64) -> Result<Arc<K>, Wrong> {
    let (at, generation) = check(handle, K::NAME)?;
    let mut table = table().write().unwrap_or_else(PoisonError::into_inner);
    let Table { places, free } = &mut *table;
    let place = places.get_mut(at);
    let Some(Place { object: here @ Some(_), .. }) = place.filter(|place| place.generation == generation)
    else {
        return Err(unknown(handle, K::NAME, places.get(at), generation));
    };
    let object = here.take_if(|object| K::of(object).is_some());
    let Some(object) = object else {
        return Err(here
            .as_ref()
            .map_or_else(|| unreachable!("it was there"), |object| other_kind(object, K::NAME)));
    };
    give_back(free, at, generation);
    K::of(&object).cloned().ok_or_else(|| unreachable!("it was of this kind"))
}

/// A place whose generations are used up is not used again.
fn give_back(free: &mut Vec<usize>, at: usize, generation: u32) {
    if generation < u32::MAX {
        free.push(at);
    }
}

/// Takes everything out of the table that belongs to a model.
pub(crate) fn take_all_of(model: u64) -> Vec<Object> {
    let mut table = table().write().unwrap_or_else(PoisonError::into_inner);
    let Table { places, free } = &mut *table;
    let mut taken = Vec::new();
    for (at, place) in places.iter_mut().enumerate() {
        if let Some(object) = place.object.take_if(|object| object.owner() == Some(model)) {
            give_back(free, at, place.generation);
            taken.push(object);
        }
    }
    taken
}
