//! Who may use the daemon, and how much of it: several users share one node, and none of them is to take what the others need.
//!
//! | room | what lives there |
//! |---|---|
//! | `access` | who may connect |
//! | `limits` | quotas as the configuration has them: for everyone, and for some users |
//! | `account` | what one user has of everything that there are quotas of |
//! | `ledger` | all accounts, and what is shared out between them |
//!
//! Whatever a session takes is charged to its user where it is taken, and given back where it is freed: an extent with its supply,
//! a file of tables with its heap, a slab with the device's memory (which may outlive the session in quarantine). So what an account
//! says is what the user really has, and it is zero once that is all gone.
//!
//! *Quotas* are what the operator says. *Shares* hold without any: where something is scarce, whoever has more than an equal share of it leaves a
//! part free for users who have less ([`Account::leaves`]).

mod access;
mod account;
mod ledger;
mod limits;

pub use access::{Access, AccessReport};
pub use account::{Account, Charge};
pub use ledger::{Ledger, UseReport, UserReport};
pub use limits::{BadAmount, Group, Limits, Quotas, UnknownName, User};
