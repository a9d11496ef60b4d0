//! Sequences that outlive this process, and prefixes that are shared with others.

use kvoyant_client::SelectedBy;

use super::{DaemonError, DaemonKv, DaemonSequence};

impl DaemonKv {
    /// Writes a sequence to an image that outlives the daemon, and closes it ([`kvoyant_client::Sequence::suspend`]). Its prompt counts as
    /// complete.
    ///
    /// # Errors
    /// A daemon that keeps no images, or cannot write this one; the sequence is closed then too.
    pub fn suspend(
        &mut self,
        mut sequence: DaemonSequence,
        image: &str,
        overwrite: bool,
    ) -> Result<(), DaemonError> {
        self.tell(&sequence)?;
        self.finish_prompt(&mut sequence)?;
        let label = format!("{} tokens of {}", sequence.tokens(), self.options.name);
        sequence.into_inner().suspend(image, overwrite, &label).map_err(|(_, error)| error.into())
    }

    /// Opens a sequence as an image has it, with this method or that of the image. What the engine itself keeps of a sequence (the last
    /// queries, factors of keys) begins anew.
    ///
    /// # Errors
    /// An image that is not there, damaged, or of another model.
    pub fn resume(&mut self, image: &str, method: Option<usize>) -> Result<DaemonSequence, DaemonError> {
        let by = method.filter(|method| *method < self.methods().len()).map(|method| self.selector(method));
        let (inner, method) = self.model.resume(image, method, by.unwrap_or(SelectedBy::Lane))?;
        let tokens = inner.tokens();
        let mut sequence = DaemonSequence::resumed(inner, method, self.shape.layers);
        self.begin_digests(&mut sequence, None);
        self.digest(&mut sequence, tokens)?;
        Ok(sequence)
    }

    /// Opens a sequence that begins with the longest published prefix of these tokens; the rest is to be computed
    /// ([`kvoyant_client::Model::attach`]).
    ///
    /// # Errors
    /// The daemon's own.
    pub fn attach(&mut self, method: usize, tokens: &[u32]) -> Result<DaemonSequence, DaemonError> {
        let by = if method < self.methods().len() { self.selector(method) } else { SelectedBy::Lane };
        let inner = self.model.attach(method, tokens, by)?;
        let attached = inner.tokens();
        let mut sequence = DaemonSequence::new(inner, method, self.shape.layers);
        sequence.set_tokens(attached);
        self.begin_digests(&mut sequence, None);
        self.digest(&mut sequence, attached)?;
        Ok(sequence)
    }

    /// Publishes the full pages of a sequence that was made of these tokens, for others to begin with: of this user, or of every user
    /// if `shared`. How many tokens can be attached to now.
    ///
    /// # Errors
    /// A daemon without room for it.
    pub fn publish(
        &self,
        sequence: &DaemonSequence,
        tokens: &[u32],
        shared: bool,
    ) -> Result<usize, DaemonError> {
        self.tell(sequence)?;
        Ok(self.model.publish(sequence.inner(), tokens, shared)?)
    }
}
