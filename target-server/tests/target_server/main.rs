//! The target server as others meet it: over the wire, and as a command.

mod command;
mod export;
mod failover;
mod proof;
mod server;
mod support;
