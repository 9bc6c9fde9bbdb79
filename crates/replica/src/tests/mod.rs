//! Tests against a simple-minded oracle, crashes at every step, failures, and readers beside the writer.

mod adopt;
mod concurrent;
mod crash;
mod failover;
mod faults;
mod golden;
mod middle;
mod model;
mod promoted;
mod random;
mod refusals;
mod retain;
mod scrub;
mod upkeep;
