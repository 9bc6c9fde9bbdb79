//! Loads what capture needs into the kernel, one part after another, and lets it go again.

#![expect(
    unsafe_code,
    reason = "making a map needs the bpf system call, whose flags aya does not let us choose"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use aya::Btf;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_program_supported};
use aya_obj::btf::BtfKind;
use block::ByteCount;

use super::{Fact, Finding, fact};

const BPF_MAP_CREATE: libc::c_long = 0;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_RING: u32 = 27;
const MAP_MMAPABLE: u32 = 1024;
const ASK_ADVICE: &str =
    "See the privileges above; a container's seccomp rules may forbid the bpf system call too.";

/// The first fields of `union bpf_attr` for BPF_MAP_CREATE (include/uapi/linux/bpf.h).
#[repr(C)]
struct MapRequest {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
}

pub(super) fn all(ring_bytes: ByteCount) -> Vec<Fact> {
    vec![ring(ring_bytes), shared_array(), program(), typed_tracepoints(), helper()]
}

fn create_map(request: &MapRequest) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the request, as long as we say it is, and gives a new handle.
    let handle = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, std::ptr::from_ref(request), size_of::<MapRequest>())
    };
    match i32::try_from(handle) {
        // SAFETY: a new handle that nobody else has.
        Ok(handle) if handle >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(handle) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The ring, as large as it is to be.
pub(super) fn ring(bytes: ByteCount) -> Fact {
    const NAME: &str = "ring of write records";
    const SMALLER: &str = "Make ring_bytes smaller, or give the machine more memory.";
    let largest = crate::kernel::RING_BYTES_MAX;
    if bytes.0 > largest {
        let found = format!("{bytes}: larger than {}, the largest that the kernel makes", ByteCount(largest));
        return fact(NAME, Finding::NoEbpf, found, SMALLER);
    }
    let entries = bytes.0.max(4096).next_power_of_two();
    let request = MapRequest {
        map_type: MAP_TYPE_RING,
        key_bytes: 0,
        value_bytes: 0,
        entries: entries as u32,
        flags: 0,
    };
    match create_map(&request) {
        Ok(_) => fact(NAME, Finding::Good, format!("{} can be had", ByteCount(entries)), ""),
        Err(error) => {
            let advice = match error.raw_os_error() {
                Some(libc::ENOMEM | libc::E2BIG) => SMALLER,
                Some(libc::EINVAL) => "Use a kernel with BPF ring buffers.",
                _ => ASK_ADVICE,
            };
            fact(
                NAME,
                Finding::NoEbpf,
                format!("the kernel refuses one of {}: {error}", ByteCount(entries)),
                advice,
            )
        }
    }
}

fn shared_array() -> Fact {
    const NAME: &str = "arrays shared with the kernel";
    let request = MapRequest {
        map_type: MAP_TYPE_ARRAY,
        key_bytes: 4,
        value_bytes: 8,
        entries: 1,
        flags: MAP_MMAPABLE,
    };
    match create_map(&request) {
        Ok(_) => fact(NAME, Finding::Good, "can be had", ""),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let advice = "Use a kernel with BPF arrays that can be mapped.";
            fact(NAME, Finding::NoEbpf, "the kernel does not know them", advice)
        }
        Err(error) => fact(NAME, Finding::NoEbpf, format!("the kernel refuses: {error}"), ASK_ADVICE),
    }
}

fn program() -> Fact {
    const NAME: &str = "raw tracepoint programs";
    match is_program_supported(ProgramType::RawTracePoint) {
        Ok(true) => fact(NAME, Finding::Good, "are taken", ""),
        Ok(false) => fact(
            NAME,
            Finding::NoEbpf,
            "the kernel does not know them",
            "Use a kernel that is built with CONFIG_BPF_EVENTS.",
        ),
        Err(error) => fact(NAME, Finding::NoEbpf, format!("the kernel refuses: {error}"), ASK_ADVICE),
    }
}

/// Where the capture programs are attached, with the kernel's own types.
fn typed_tracepoints() -> Fact {
    const NAME: &str = "typed block tracepoints";
    let types = match Btf::from_sys_fs() {
        Ok(types) => types,
        Err(error) => {
            let advice = "See the kernel's types above.";
            return fact(NAME, Finding::NoEbpf, format!("read the kernel's types: {error}"), advice);
        }
    };
    let absent = crate::kernel::tracepoints()
        .find(|name| types.id_by_type_name_kind(&format!("btf_trace_{name}"), BtfKind::Typedef).is_err());
    match absent {
        None => fact(NAME, Finding::Good, "are there", ""),
        Some(name) => {
            let advice = "Use a kernel with these tracepoints, as Debian's are since 5.10.";
            fact(NAME, Finding::NoEbpf, format!("the kernel has no {name}"), advice)
        }
    }
}

fn helper() -> Fact {
    const NAME: &str = "loops in programs (bpf_loop)";
    match is_helper_supported(ProgramType::RawTracePoint, BpfHelper::BPF_FUNC_loop) {
        Ok(true) => fact(NAME, Finding::Good, "are taken", ""),
        Ok(false) => fact(
            NAME,
            Finding::NoEbpf,
            "the kernel does not know them",
            "Use a kernel with the helper bpf_loop.",
        ),
        Err(error) => fact(NAME, Finding::NoEbpf, format!("the kernel refuses: {error}"), ASK_ADVICE),
    }
}
