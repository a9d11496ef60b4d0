//! Whoever means harm, and whatever fails: clients that lie, users who take everything, calls that fail, daemons that die.

mod alone;
mod call_faults;
mod hostile;
mod hostile_images;
mod isolation;
