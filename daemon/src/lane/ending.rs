//! How a lane tells the control plane that a session has to end.

use tokio::sync::Notify;

use crate::lane::error::SessionError;

/// See the module.
#[derive(Debug, Default)]
pub struct Ending {
    over: std::sync::OnceLock<Over>,
    notify: Notify,
}

/// Why a session has to end.
#[derive(Debug, Clone)]
pub struct Over {
    /// In words.
    pub reason: String,
    /// Whether the client did nothing wrong.
    pub ours: bool,
}

impl Ending {
    pub(super) fn end(&self, error: &SessionError) {
        let over = Over { reason: error.to_string(), ours: error.is_ours() };
        if self.over.set(over).is_ok() {
            self.notify.notify_one();
        }
    }

    /// Waits until the session has to end, and says why.
    pub async fn ended(&self) -> Over {
        loop {
            // Whoever asks again is told again.
            if let Some(over) = self.over.get() {
                return over.clone();
            }
            self.notify.notified().await;
        }
    }
}
