//! What the processes of one machine share: who holds how much of which device's memory.
//!
//! A table in a mapped file, changed under a file lock. Each row says that a process holds an allocation. The physical
//! memory of an allocation is in use while anybody holds it, and a while longer after a holder's sudden end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use crate::options::Options;
use crate::os;

/// Rows of the table; more holdings than that are out of memory.
const ROWS: usize = 16384;

/// Says that a file is a machine of this layout.
const MAGIC: u64 = 0x6b76_736f_6674_0001;

/// Why a process holds an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Role {
    /// It allocated it.
    Owner = 1,
    /// It opened a handle of it.
    Importer = 2,
    /// It has a handle of physical memory, made or imported.
    Handle = 3,
    /// What its context takes.
    Context = 4,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Row {
    /// 0 where the row is free.
    role: u32,
    pid: u32,
    device: u32,
    /// How often this process holds it in this role.
    count: u32,
    started: u64,
    id: u64,
    bytes: u64,
    /// When the process was found to have ended, or 0.
    ended_ns: u64,
}

#[repr(C)]
struct Table {
    magic: u64,
    next_id: u64,
    rows: [Row; ROWS],
}

/// The machine as this process sees it.
#[derive(Debug)]
pub(crate) struct Machine {
    file: File,
    table: u64,
    lock: Mutex<()>,
    me: (u32, u64),
    memory: u64,
    late_ns: u64,
}

/// A hold could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The device has not that much left.
    Memory,
    /// Another process has the device for itself.
    Exclusive,
}

impl Machine {
    /// Opens the machine of the options' folder, or makes one for this process alone.
    pub(crate) fn open(options: &Options) -> io::Result<Self> {
        let bytes = size_of::<Table>() as u64;
        let file = match &options.folder {
            None => os::memory_file("softcuda-machine", bytes)?,
            Some(folder) => {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(folder.join("machine"))?;
                file.set_len(bytes)?;
                file
            }
        };
        let table = os::map(&file, bytes, os::Protection::ReadWrite)?;
        let pid = os::pid();
        let machine = Self {
            file,
            table,
            lock: Mutex::new(()),
            me: (pid, os::started(pid).unwrap_or(0)),
            memory: options.memory,
            late_ns: options.late_ms * 1_000_000,
        };
        machine.with(|table| {
            if table.magic == 0 {
                table.magic = MAGIC;
                // On a machine of its own a process still meets the handles of others.
                table.next_id = if options.folder.is_some() { 1 } else { u64::from(pid) << 32 };
            }
            if table.magic == MAGIC { Ok(()) } else { Err(io::Error::other("not a machine of softcuda")) }
        })?;
        Ok(machine)
    }

    /// This process: its number and when it started.
    pub(crate) fn me(&self) -> (u32, u64) {
        self.me
    }

    fn with<R>(&self, work: impl FnOnce(&mut Table) -> R) -> R {
        let _threads = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: plain calls on a descriptor that this value owns.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_EX) };
        // SAFETY: the mapping has the table's size and is of plain numbers; while the file's lock and the mutex are
        // held nobody else reads or writes it.
        let result = work(unsafe { &mut *(self.table as *mut Table) });
        // SAFETY: as above.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
        result
    }

    /// A number that no other allocation of the machine has.
    pub(crate) fn new_id(&self) -> u64 {
        self.with(|table| {
            table.next_id += 1;
            table.next_id
        })
    }

    /// Takes hold of an allocation; only the first holder of it needs room for its bytes.
    pub(crate) fn hold(&self, role: Role, device: u32, id: u64, bytes: u64) -> Result<(), Refused> {
        self.with(|table| {
            self.sweep(table);
            if let Some(row) = table.rows.iter_mut().find(|row| self.is_mine(row, role) && row.id == id) {
                row.count += 1;
                return Ok(());
            }
            let known = table.rows.iter().any(|row| row.role != 0 && row.id == id);
            if !known && used(table, device) + bytes > self.memory {
                return Err(Refused::Memory);
            }
            let row = table.rows.iter_mut().find(|row| row.role == 0).ok_or(Refused::Memory)?;
            let (pid, started) = self.me;
            *row = Row { role: role as u32, pid, device, count: 1, started, id, bytes, ended_ns: 0 };
            Ok(())
        })
    }

    /// Takes what a context needs; with `alone`, only if no other living process has one on the device.
    pub(crate) fn enter(&self, device: u32, bytes: u64, alone: bool) -> Result<u64, Refused> {
        let others = alone
            && self.with(|table| {
                self.sweep(table);
                table.rows.iter().any(|row| {
                    row.role == Role::Context as u32
                        && row.device == device
                        && row.ended_ns == 0
                        && (row.pid, row.started) != self.me
                })
            });
        if others {
            return Err(Refused::Exclusive);
        }
        let id = self.new_id();
        self.hold(Role::Context, device, id, bytes).map(|()| id)
    }

    /// Lets go once.
    pub(crate) fn release(&self, role: Role, id: u64) {
        self.with(|table| {
            if let Some(row) = table.rows.iter_mut().find(|row| self.is_mine(row, role) && row.id == id) {
                row.count -= 1;
                if row.count == 0 {
                    row.role = 0;
                }
            }
        });
    }

    /// Bytes in use on a device.
    pub(crate) fn used(&self, device: u32) -> u64 {
        self.with(|table| {
            self.sweep(table);
            used(table, device)
        })
    }

    /// The living processes other than this one that have opened an allocation.
    pub(crate) fn importers(&self, id: u64) -> Vec<u32> {
        self.with(|table| {
            self.sweep(table);
            let open = |row: &&Row| row.role == Role::Importer as u32 && row.id == id && row.ended_ns == 0;
            table.rows.iter().filter(open).map(|row| row.pid).filter(|pid| *pid != self.me.0).collect()
        })
    }

    /// Whether a living process still owns an allocation.
    pub(crate) fn is_owned(&self, id: u64) -> bool {
        self.with(|table| {
            self.sweep(table);
            table.rows.iter().any(|row| row.role == Role::Owner as u32 && row.id == id && row.ended_ns == 0)
        })
    }

    fn is_mine(&self, row: &Row, role: Role) -> bool {
        row.role == role as u32 && (row.pid, row.started) == self.me
    }

    /// Finds processes that have ended, and gives back what they held once it is late enough.
    fn sweep(&self, table: &mut Table) {
        let now = os::now_ns();
        let mut last = (self.me, true);
        for row in table.rows.iter_mut().filter(|row| row.role != 0) {
            let process = (row.pid, row.started);
            if process != last.0 {
                last = (process, os::started(row.pid) == Some(row.started));
            }
            if !last.1 && row.ended_ns == 0 {
                row.ended_ns = now;
            }
            if row.ended_ns != 0 && now - row.ended_ns >= self.late_ns {
                row.role = 0;
            }
        }
    }
}

/// Bytes in use on a device; an allocation that many hold counts once.
fn used(table: &Table, device: u32) -> u64 {
    let mut held: Vec<(u64, u64)> = table
        .rows
        .iter()
        .filter(|row| row.role != 0 && row.device == device)
        .map(|row| (row.id, row.bytes))
        .collect();
    held.sort_unstable();
    held.dedup_by_key(|(id, _)| *id);
    held.iter().map(|(_, bytes)| bytes).sum()
}
