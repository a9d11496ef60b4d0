//! The daemon as engines meet it: answers, what methods may ask for, what is refused, what comes late.

mod accounting;
mod late;
mod limits;
mod memories;
mod methods;
mod minors;
mod selected_here;
mod service;
mod turns;
