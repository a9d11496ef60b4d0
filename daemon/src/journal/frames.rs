//! Frames that were taken since the journal was last sealed.
//!
//! A page that is on disk, as the journal says, may leave its frame at any time, and another one is read into it: the journal still names
//! the frame. So each frame is written down here before anything is read into it, and the next daemon believes the journal of all
//! the others. It also finds here up to which ticket answers were given, whose rows the client may still be reading.
//!
//! A file of its own in memory, of one size, and valid at every moment: a count of entries is stored behind each entry. There is no
//! checksum, for there is no moment at which it could be made; what it says is checked against what the journal says.
//!
//! ```text
//! 0                8               16                    64
//! last ticket (8)  entries (4)     (zero)                frame (4); …
//! ```

use std::os::fd::OwnedFd;

use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};

const TICKET_AT: usize = 0;
const COUNT_AT: usize = 8;
const ENTRIES_AT: usize = 64;
/// Frames that there is room for.
const ENTRIES: u32 = 1 << 15;
const BYTES: usize = ENTRIES_AT + ENTRIES as usize * 4;
/// So few are never too many.
const ENTRIES_LEAST: u32 = 64;
/// There were more.
const MANY: u32 = u32::MAX;

/// See the module.
#[derive(Debug)]
pub struct FrameLog {
    memory: SharedMapping,
    count: u32,
    ticket: u64,
}

/// What a daemon had written down when it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct TakenFrames {
    /// The last ticket that may have been answered.
    pub ticket: u64,
    /// Which frames were taken; `None`: any of them may have been.
    pub frames: Option<Vec<u32>>,
}

impl FrameLog {
    /// An empty log, and its file for the next daemon.
    ///
    /// # Errors
    /// If the system has no memory for it.
    pub fn create() -> Result<(Self, OwnedFd), MemoryError> {
        let file = Memfd::create("kvoyant-frames", BYTES)?;
        file.seal(Seals::fixed_size())?;
        Ok((Self { memory: file.map(true)?, count: 0, ticket: 0 }, file.try_clone()?))
    }

    /// Goes on with the log of the daemon before, and says what is in it.
    ///
    /// # Errors
    /// A file that is none.
    pub fn over(file: OwnedFd) -> Result<(Self, TakenFrames), MemoryError> {
        let memory = Memfd::from_peer(file, BYTES, Seals::fixed_size())?.map(true)?;
        let count = memory.load_u32(COUNT_AT);
        let frames = (count <= ENTRIES).then(|| (0..count).map(|at| memory.load_u32(entry(at))).collect());
        let ticket = memory.load_u64(TICKET_AT);
        Ok((Self { memory, count, ticket }, TakenFrames { ticket, frames }))
    }

    /// A frame is about to be filled with something else.
    pub fn take(&mut self, frame: u32) {
        if self.count >= ENTRIES {
            self.count = MANY;
        } else {
            self.memory.store_u32(entry(self.count), frame);
            self.count += 1;
        }
        // Behind the entry, so that what counts is there.
        self.memory.store_u32(COUNT_AT, self.count);
    }

    /// Whether it should be emptied soon, where so many frames are free: the next daemon cannot use those that are written down until answers of
    /// before are let go of.
    #[must_use]
    pub fn is_filling(&self, free: usize) -> bool {
        self.count > ENTRIES / 2 || self.count > ENTRIES_LEAST && self.count as usize > free / 2
    }

    /// An answer is about to be given. One that another daemon has given already is nothing new.
    pub fn answers(&mut self, ticket: u64) {
        if ticket > self.ticket {
            self.ticket = ticket;
            self.memory.store_u64(TICKET_AT, ticket);
        }
    }

    /// The journal has been sealed: it knows of everything but these, of which those that are written down already come first and as they
    /// follow one another there.
    pub fn clear_but(&mut self, frames: &[u32]) {
        self.count = if frames.len() > ENTRIES as usize { MANY } else { frames.len() as u32 };
        // None of them is overwritten before it is where it comes to stand.
        for (at, frame) in (0..ENTRIES).zip(frames) {
            self.memory.store_u32(entry(at), *frame);
        }
        self.memory.store_u32(COUNT_AT, self.count);
    }
}

fn entry(at: u32) -> usize {
    ENTRIES_AT + at as usize * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_is_found_by_the_next_daemon_until_the_journal_is_sealed() {
        let (mut log, file) = FrameLog::create().unwrap();
        let next = || FrameLog::over(file.try_clone().unwrap()).unwrap().1;
        assert_eq!(next(), TakenFrames { ticket: 0, frames: Some(Vec::new()) });
        log.take(7);
        log.take(u32::MAX - 1);
        log.answers(1 << 40);
        assert_eq!(next(), TakenFrames { ticket: 1 << 40, frames: Some(vec![7, u32::MAX - 1]) });
        log.answers(12);
        log.clear_but(&[9]);
        assert_eq!(next(), TakenFrames { ticket: 1 << 40, frames: Some(vec![9]) });
        log.clear_but(&[]);
        assert_eq!(next(), TakenFrames { ticket: 1 << 40, frames: Some(Vec::new()) });
    }

    #[test]
    fn more_than_there_is_room_for_is_all_of_them() {
        let (mut log, file) = FrameLog::create().unwrap();
        (0..ENTRIES).for_each(|frame| log.take(frame));
        let next = || FrameLog::over(file.try_clone().unwrap()).unwrap().1.frames;
        assert!(log.is_filling(usize::MAX) && next().is_some_and(|frames| frames.len() == ENTRIES as usize));
        for _ in 0..2 {
            log.take(3);
            assert_eq!(next(), None);
        }
        log.clear_but(&(0..ENTRIES + 1).collect::<Vec<_>>());
        assert_eq!(next(), None);
        log.clear_but(&[]);
        assert!(!log.is_filling(0) && next() == Some(Vec::new()));
        (0..=ENTRIES_LEAST).for_each(|frame| log.take(frame));
        assert!(log.is_filling(10) && !log.is_filling(1000));
    }

    #[test]
    fn another_file_is_no_log() {
        let other = Memfd::create("other", 4096).unwrap();
        assert!(FrameLog::over(other.try_clone().unwrap()).is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(FrameLog::over(null.into()).is_err());
    }
}
