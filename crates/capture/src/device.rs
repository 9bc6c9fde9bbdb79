use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use block::ByteCount;

use crate::CaptureError;

/// A disk that can be captured: a whole block device whose driver uses requests.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    number: u64,
    size: ByteCount,
    logical_block: u32,
    sequence: u64,
    read_only: bool,
    direct: File,
}

impl Device {
    /// Opens a disk for direct reading and checks that its writes can be captured.
    ///
    /// # Errors
    /// When it is not a block device, is a partition, has no size, or has a driver without requests
    /// (device mapper, md, zram): the error names the disks to protect instead.
    pub fn open(path: &Path) -> Result<Device, CaptureError> {
        let refuse = |reason: String| CaptureError::NotCapturable { path: path.to_owned(), reason };
        let metadata = fs::metadata(path).map_err(CaptureError::io("look at device", path))?;
        if !metadata.file_type().is_block_device() {
            return Err(refuse(
                "not a block device. Name a disk such as /dev/vda, or use source = \"scan\" for a file"
                    .into(),
            ));
        }
        let number = metadata.rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let sys = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        let sys = fs::canonicalize(&sys).map_err(CaptureError::io("look up", &sys))?;
        if sys.join("partition").exists() {
            let disk = sys.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
            return Err(refuse(format!("a partition. Protect the whole disk: /dev/{disk}")));
        }
        if !sys.join("mq").exists() {
            let below: Vec<String> = fs::read_dir(sys.join("slaves"))
                .map(|names| {
                    names
                        .flatten()
                        .map(|name| format!("/dev/{}", name.file_name().to_string_lossy()))
                        .collect()
                })
                .unwrap_or_default();
            return Err(refuse(if below.is_empty() {
                "its driver has no request queue, so its writes cannot be seen; use source = \"scan\"".into()
            } else {
                format!("made of other disks. Protect the disks below: {}", below.join(", "))
            }));
        }
        let attribute = |name: &str| -> Result<u64, CaptureError> {
            let file = sys.join(name);
            let text = fs::read_to_string(&file).map_err(CaptureError::io("read", &file))?;
            text.trim()
                .parse()
                .map_err(|_| refuse(format!("{} holds {text:?}, not a number", file.display())))
        };
        let size = ByteCount(attribute("size")? * block::SECTOR_BYTES);
        if size == ByteCount::ZERO {
            return Err(refuse("it has no size: no medium, or an unused loop device".into()));
        }
        // A disk that was handed over is read-only for a while; what is written to it afterwards is seen as ever.
        let read_only = attribute("ro")? != 0;
        let logical_block = u32::try_from(attribute("queue/logical_block_size")?)
            .map_err(|_| refuse("its logical block size is out of range".into()))?;
        let sequence = attribute("diskseq").unwrap_or(0);
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(CaptureError::io("open for direct reading", path))?;
        Ok(Device { path: path.to_owned(), number, size, logical_block, sequence, read_only, direct })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size when opened.
    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// Whether nothing could be written to it when it was opened.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Its logical block, in bytes.
    pub fn logical_block(&self) -> u32 {
        self.logical_block
    }

    /// The number under which the block layer knows it: major << 20 | minor.
    pub(crate) fn kernel_number(&self) -> u32 {
        rustix::fs::major(self.number) << 20 | rustix::fs::minor(self.number)
    }

    /// A number that the kernel gives to no other medium while it runs; 0 when it gives none (before 5.15).
    pub(crate) fn disk_sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the kernel counts what is written to it, which is a second witness to every write (docs/capture.md).
    pub fn counts_writes(&self) -> bool {
        let (major, minor) = (rustix::fs::major(self.number), rustix::fs::minor(self.number));
        let switch = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/iostats"));
        switch.is_ok_and(|text| text.trim() == "1")
    }

    /// A handle for direct reading.
    ///
    /// # Errors
    /// When the process is out of file handles.
    pub fn direct(&self) -> Result<File, CaptureError> {
        self.direct.try_clone().map_err(CaptureError::io("duplicate the handle of", &self.path))
    }
}
