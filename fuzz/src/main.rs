//! One program for all targets, so that it is linked once. The environment says what it does:
//!
//! - nothing: prints the targets' names;
//! - `SEAWALL_FUZZ_SEEDS=DIR`: writes what each target begins with into `DIR/<target>/`, made by the encoders whose bytes the
//!   golden tests hold;
//! - `SEAWALL_FUZZ_TARGET=NAME`: is libFuzzer on that target.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

struct Target {
    name: &'static str,
    run: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:literal: $run:path, $seeds:path;)*) => {
        const TARGETS: &[Target] = &[$(Target { name: $name, run: $run, seeds: $seeds }),*];
    };
}

targets! {
    "agent-disks": seawall_agent::fuzzing::disks, seawall_agent::fuzzing::disks_seeds;
    "cache-cursors": cache::fuzzing::cursors, cache::fuzzing::cursors_seeds;
    "cache-segment": cache::fuzzing::segment, cache::fuzzing::segment_seeds;
    "capture-record": capture::fuzzing::record, capture::fuzzing::record_seeds;
    "changeset": changeset::fuzzing::open_arbitrary, changeset::fuzzing::open_seeds;
    "changeset-compare": changeset::fuzzing::compare, changeset::fuzzing::compare_seeds;
    "changeset-note": changeset::fuzzing::note, changeset::fuzzing::note_seeds;
    "changeset-volumes": changeset::fuzzing::volumes, changeset::fuzzing::volumes_seeds;
    "control-api": control::fuzzing::api, control::fuzzing::api_seeds;
    "control-parts": control::fuzzing::parts, control::fuzzing::parts_seeds;
    "control-requests": control::fuzzing::requests, control::fuzzing::requests_seeds;
    "durable-record": durable::fuzzing::record, durable::fuzzing::record_seeds;
    "enrol-desired": enrol::fuzzing::desired, enrol::fuzzing::desired_seeds;
    "enrol-texts": enrol::fuzzing::texts, enrol::fuzzing::texts_seeds;
    "export-nbd": export::fuzzing::serve_arbitrary, export::fuzzing::serve_seeds;
    "replica-catalogue": replica::fuzzing::catalogue, replica::fuzzing::catalogue_seeds;
    "replica-checksums": replica::fuzzing::checksums, replica::fuzzing::checksums_seeds;
    "replica-damaged": replica::fuzzing::damaged, replica::fuzzing::damaged_seeds;
    "replica-journal": replica::fuzzing::journal, replica::fuzzing::journal_seeds;
    "replica-layer": replica::fuzzing::layer, replica::fuzzing::layer_seeds;
    "replica-pins": replica::fuzzing::pins, replica::fuzzing::pins_seeds;
    "replica-promoted": replica::fuzzing::promoted, replica::fuzzing::promoted_seeds;
    "replica-span": replica::fuzzing::span, replica::fuzzing::span_seeds;
    "replica-state": replica::fuzzing::state, replica::fuzzing::state_seeds;
    "replica-tree": replica::fuzzing::tree, replica::fuzzing::tree_seeds;
    "wire-certificate": wire::fuzzing::certificate, wire::fuzzing::certificate_seeds;
    "wire-frames": wire::fuzzing::frames, wire::fuzzing::frames_seeds;
    "wire-handshake": wire::fuzzing::handshake, wire::fuzzing::handshake_seeds;
    "wire-revoked": wire::fuzzing::revoked, wire::fuzzing::revoked_seeds;
}

/// The most that is allocated at once, in bytes. No input is longer than a few thousand bytes, and no decoder needs more than
/// a frame of 1 MiB and a little; more is an allocation from a length that nobody checked.
const ALLOCATION_BYTES_MAX: usize = 24 << 20;

struct Guard;

#[global_allocator]
static GUARD: Guard = Guard;

fn guard(bytes: usize) {
    if bytes > ALLOCATION_BYTES_MAX {
        let _ = std::io::stderr().write_all(b"an allocation from a length that was not checked\n");
        std::process::abort();
    }
}

// SAFETY: everything is passed on as it is to the system's allocator.
unsafe impl GlobalAlloc for Guard {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        guard(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        guard(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        guard(size);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn target() -> &'static Target {
    static TARGET: OnceLock<&'static Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("SEAWALL_FUZZ_TARGET").unwrap_or_default();
        TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no target is called {name:?}"))
    })
}

fn begin() {
    if let Some(dir) = std::env::var_os("SEAWALL_FUZZ_SEEDS") {
        for target in TARGETS {
            let dir = Path::new(&dir).join(target.name);
            std::fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("make {}: {error}", dir.display()));
            for (number, seed) in (target.seeds)().into_iter().enumerate() {
                let path = dir.join(format!("seed-{number}"));
                std::fs::write(&path, seed).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
            }
        }
        std::process::exit(0);
    }
    if std::env::var_os("SEAWALL_FUZZ_TARGET").is_none() {
        TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    }
    target();
}

libfuzzer_sys::fuzz_target!(init: begin(), |data: &[u8]| (target().run)(data));
