//! A libvirt domain whose disks are an export.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::bail;
use control::{ExportInfo, ExportPlace};

use crate::export::socket;

/// `virsh create` takes it. Without network, so that a drill reaches nobody.
pub(crate) fn domain(info: &ExportInfo, bridge: Option<&Path>) -> anyhow::Result<String> {
    if !info.writable && !info.promoted {
        bail!("describe a machine on a read-only export: it could not boot; add --writable");
    }
    let mut out = format!(
        "<domain type='kvm'>\n  <name>seawall-{}-{}</name>\n  <memory unit='MiB'>2048</memory>\n  <vcpu>2</vcpu>\n  \
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\n  <features><acpi/><apic/></features>\n  <devices>\n",
        info.group, info.point.epoch
    );
    for (index, volume) in info.volumes.iter().enumerate() {
        let (host, tls) = match (socket(info, bridge), &info.place) {
            (Some(socket), _) => {
                (format!("<host transport='unix' socket='{}'/>", escaped(&socket.display().to_string())), "")
            }
            (None, ExportPlace::Tls(address)) => (
                format!("<host name='{}' port='{}'/>", address.ip(), address.port()),
                " tls='yes' tlsHostname='target-server.seawall.invalid'",
            ),
            (None, ExportPlace::Plain(address)) => {
                (format!("<host name='{}' port='{}'/>", address.ip(), address.port()), "")
            }
            (None, _) => bail!("describe a machine: the export has no address"),
        };
        let _ = write!(
            out,
            "    <disk type='network' device='disk'>\n      <driver name='qemu' type='raw' discard='unmap'/>\n      \
             <source protocol='nbd' name='{}'{tls}>{host}</source>\n      <target dev='{}' bus='virtio'/>\n      \
             <boot order='{}'/>\n    </disk>\n",
            escaped(&volume.name),
            disk_name(index),
            index + 1,
        );
    }
    out.push_str(
        "    <serial type='pty'/>\n    <console type='pty'/>\n    <graphics type='vnc'/>\n    <video/>\n  </devices>\n</domain>\n",
    );
    Ok(out)
}

/// vda to vdz, vdaa and so on.
fn disk_name(mut index: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.push(b'a' + (index % 26) as u8);
        if index < 26 {
            break;
        }
        index = index / 26 - 1;
    }
    letters.reverse();
    format!("vd{}", String::from_utf8_lossy(&letters))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&apos;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::tests::info;

    #[test]
    fn disks_are_in_order_and_reach_the_export() {
        let xml = domain(&info(ExportPlace::Socket("/run/it's.sock".into())), None).unwrap();
        assert!(xml.contains("socket='/run/it&apos;s.sock'") && xml.contains("name='vd b'"), "{xml}");
        assert!(xml.find("dev='vda'").unwrap() < xml.find("dev='vdb'").unwrap());
        assert!(!xml.contains("<interface"), "a drill has no network: {xml}");
        let xml = domain(&info(ExportPlace::Tls("10.0.0.1:99".parse().unwrap())), None).unwrap();
        assert!(xml.contains("tls='yes'") && xml.contains("name='10.0.0.1' port='99'"), "{xml}");
        let mut read_only = info(ExportPlace::Socket("/x".into()));
        read_only.writable = false;
        assert!(domain(&read_only, None).unwrap_err().to_string().contains("--writable"));
        assert_eq!([0, 25, 26, 51, 52].map(disk_name), ["vda", "vdz", "vdaa", "vdaz", "vdba"]);
    }
}
