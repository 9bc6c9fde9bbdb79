//! Where the kernel keeps page frames, found without a kernel symbol (kallsyms often lacks them).
//!
//! A page's address is `(bv_page - vmemmap) / sizeof(struct page) * page size + direct map`. We fill a locked page with random
//! bytes and look up its frame number; a direct read of the disk into that page passes `block_rq_issue` before
//! the data arrives, where the program tries each 1 GiB-aligned base until the random bytes appear, and notes the
//! `bv_page`. A second page must then be found with the same two bases, or data mode stays off.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt;

use aya::maps::Array;
use aya::{Btf, Ebpf};

use super::attach::program;
use super::layout::Calibration;
use crate::Device;
use crate::disk::Buffer;

/// Another process may read the same sector at the same moment; then we try again.
const ATTEMPTS: usize = 5;

pub(super) struct Found {
    pub(super) vmemmap: u64,
    pub(super) direct_map: u64,
    pub(super) page_struct_shift: u64,
    pub(super) page_shift: u64,
}

/// Finds the two bases, or says why not.
pub(super) fn calibrate(ebpf: &mut Ebpf, btf: &Btf, device: &Device) -> Result<Found, String> {
    let program = program(ebpf, "on_calibrate").map_err(|error| error.to_string())?;
    program
        .load("block_rq_issue", btf)
        .map_err(|error| format!("the kernel refused the calibration program: {error}"))?;
    let link = program.attach().map_err(|error| format!("attach the calibration program: {error}"))?;
    let found = search(ebpf, device);
    if let Ok(program) = self::program(ebpf, "on_calibrate") {
        program.detach(link).map_err(|error| format!("detach the calibration program: {error}"))?;
    }
    found
}

fn search(ebpf: &mut Ebpf, device: &Device) -> Result<Found, String> {
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        let first = match observe(ebpf, device, 0) {
            Ok(first) => first,
            Err(reason) => {
                why = reason;
                continue;
            }
        };
        let size = first.page_struct_bytes;
        if !size.is_power_of_two() {
            return Err(format!("struct page has {size} bytes, not a power of two"));
        }
        let vmemmap = first.page.wrapping_sub(first.pfn.wrapping_mul(size));
        match observe(ebpf, device, first.direct_map) {
            Ok(second) if second.page == vmemmap.wrapping_add(second.pfn.wrapping_mul(size)) => {
                return Ok(Found {
                    vmemmap,
                    direct_map: first.direct_map,
                    page_struct_shift: u64::from(size.trailing_zeros()),
                    page_shift: first.page_shift,
                });
            }
            Ok(_) => why = "two pages do not agree on where struct pages are (no sparse vmemmap?)".into(),
            Err(reason) => why = reason,
        }
    }
    Err(why)
}

/// One read of a random sector into a page of random bytes; `direct_map` 0 means search.
fn observe(ebpf: &mut Ebpf, device: &Device, direct_map: u64) -> Result<Calibration, String> {
    let page_bytes = rustix::param::page_size();
    let mut random = [0_u8; 24];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(|error| error.to_string())?;
    let word =
        |index: usize| u64::from_le_bytes(random[index * 8..index * 8 + 8].try_into().expect("8 bytes"));
    let mut page = Buffer::zeroed(page_bytes);
    lock(&page)?;
    page[..16].copy_from_slice(&random[..16]);
    let pfn = frame_number(&page)?;
    let pages = device.size().0 / page_bytes as u64;
    if pages == 0 {
        return Err("the disk is smaller than a page".into());
    }
    let offset = word(2) % pages * page_bytes as u64;
    let mut state = Calibration {
        dev: u64::from(device.kernel_number()),
        sector: offset / block::SECTOR_BYTES,
        pfn,
        magic: [word(0), word(1)],
        direct_map,
        page_shift: u64::from(page_bytes.trailing_zeros()),
        ..Calibration::default()
    };
    let map = ebpf.map_mut("calibration").ok_or("the object has no calibration map")?;
    let mut map: Array<_, Calibration> = Array::try_from(map).map_err(|error| error.to_string())?;
    map.set(0, state, 0).map_err(|error| error.to_string())?;
    let disk = device.direct().map_err(|error| error.to_string())?;
    disk.read_exact_at(&mut page, offset).map_err(|error| format!("direct read for calibration: {error}"))?;
    state = map.get(&0, 0).map_err(|error| error.to_string())?;
    if state.page == 0 {
        return Err("a direct read was not seen at block_rq_issue".into());
    }
    if state.page_offset != 0 || state.found == 0 {
        return Err("the page of a direct read was not found in the kernel's direct map".into());
    }
    Ok(state)
}

fn lock(page: &Buffer) -> Result<(), String> {
    #[expect(unsafe_code, reason = "mlock is a promise about an address range")]
    // SAFETY: the range is ours; locking changes nothing about it. Freed memory is unlocked with its mapping or harmless.
    let locked = unsafe { rustix::mm::mlock(page.as_ptr().cast_mut().cast(), page.len()) };
    locked.map_err(|error| format!("lock a page in memory: {error}"))
}

/// The physical frame behind a page of ours, from /proc/self/pagemap (needs CAP_SYS_ADMIN).
fn frame_number(page: &Buffer) -> Result<u64, String> {
    let pagemap =
        File::open("/proc/self/pagemap").map_err(|error| format!("open /proc/self/pagemap: {error}"))?;
    let mut entry = [0; 8];
    let index = page.as_ptr() as u64 / rustix::param::page_size() as u64;
    pagemap
        .read_exact_at(&mut entry, index * 8)
        .map_err(|error| format!("read /proc/self/pagemap: {error}"))?;
    let entry = u64::from_le_bytes(entry);
    match entry & ((1 << 55) - 1) {
        0 => Err("/proc/self/pagemap hides frame numbers: CAP_SYS_ADMIN is missing".into()),
        pfn if entry >> 63 == 1 => Ok(pfn),
        _ => Err("the locked page is not present".into()),
    }
}
