//! How a lane tells the control plane that a session has to end.

use tokio::sync::Notify;

use crate::lane::error::SessionError;

/// See the module.
#[derive(Debug, Default)]
pub struct Ending {
    reason: std::sync::OnceLock<String>,
    notify: Notify,
}

impl Ending {
    pub(super) fn end(&self, error: &SessionError) {
        if self.reason.set(error.to_string()).is_ok() {
            self.notify.notify_one();
        }
    }

    /// Waits until the session has to end, and says why.
    pub async fn ended(&self) -> String {
        loop {
            // Whoever asks again is told again.
            if let Some(reason) = self.reason.get() {
                return reason.clone();
            }
            self.notify.notified().await;
        }
    }
}
