//! What a device's content says of itself.

use std::path::Path;
use std::process::{Command, Stdio};

/// UUIDs found on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tags {
    /// Of a file system, or of an array that this is a member of.
    pub(super) uuid: Option<String>,
    /// Of the member.
    pub(super) uuid_sub: Option<String>,
    /// Of the partition table.
    pub(super) pt_uuid: Option<String>,
}

/// Reads a device's tags.
pub(super) type Prober = Box<dyn Fn(&Path) -> Tags + Send + Sync>;

/// Asks blkid(8), past its cache. A device that cannot be read, or says nothing, has no tags.
pub(super) fn blkid(device: &Path) -> Tags {
    let output = ["blkid", "/usr/sbin/blkid", "/sbin/blkid"].into_iter().find_map(|program| {
        let mut command = Command::new(program);
        command.args(["--probe", "--output", "export"]).arg(device);
        command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()
    });
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    parse(&text)
}

fn parse(text: &str) -> Tags {
    let tag = |name: &str| {
        let values = text.lines().filter_map(|line| line.split_once('='));
        values
            .filter(|(key, value)| *key == name && !value.is_empty())
            .map(|(_, value)| value.to_owned())
            .next()
    };
    Tags { uuid: tag("UUID"), uuid_sub: tag("UUID_SUB"), pt_uuid: tag("PTUUID") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_read() {
        let tags = parse("DEVNAME=/dev/vda\nPTUUID=ce41efaa\nPTTYPE=gpt\nUUID_SUB=\nUUID=1-2\n");
        assert_eq!(tags, Tags { uuid: Some("1-2".into()), uuid_sub: None, pt_uuid: Some("ce41efaa".into()) });
        assert_eq!(parse(""), Tags::default());
    }
}
