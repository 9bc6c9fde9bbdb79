//! Two sites that have a network each and a cable between them.

use std::process::Command;

use scratch::run;

/// One end of the cable.
#[derive(Clone, Debug)]
pub struct Side {
    /// Its network namespace, as a file.
    pub namespace: String,
    /// Its address.
    pub address: String,
}

/// Both. Their networks are taken down when dropped.
#[derive(Debug)]
pub struct TwoSites {
    /// Where the source is.
    pub a: Side,
    /// Where the target is.
    pub b: Side,
    names: [String; 2],
}

/// The cable's end, in either namespace.
const CABLE: &str = "cable";

impl TwoSites {
    /// Makes them.
    ///
    /// # Errors
    /// When `ip` says so.
    pub fn make() -> anyhow::Result<TwoSites> {
        let names = ["a", "b"].map(|side| format!("seawall-{}-{side}", std::process::id()));
        let side = |name: &String, number: u8| Side {
            namespace: format!("/run/netns/{name}"),
            address: format!("10.232.0.{number}"),
        };
        let sites = TwoSites { a: side(&names[0], 1), b: side(&names[1], 2), names };
        for name in &sites.names {
            run("ip", &["netns", "add", name])?;
        }
        let [a, b] = &sites.names;
        run("ip", &["-n", a, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", b])?;
        for (name, side) in [(a, &sites.a), (b, &sites.b)] {
            run("ip", &["-n", name, "addr", "add", &format!("{}/24", side.address), "dev", CABLE])?;
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
            run("ip", &["-n", name, "link", "set", CABLE, "up"])?;
        }
        Ok(sites)
    }

    /// Nothing goes over the cable any more.
    ///
    /// # Errors
    /// When `ip` says so.
    pub fn cut(&self) -> anyhow::Result<()> {
        run("ip", &["-n", &self.names[0], "link", "set", CABLE, "down"]).map(drop)
    }

    /// It does again.
    ///
    /// # Errors
    /// When `ip` says so.
    pub fn mend(&self) -> anyhow::Result<()> {
        run("ip", &["-n", &self.names[0], "link", "set", CABLE, "up"]).map(drop)
    }
}

impl Drop for TwoSites {
    fn drop(&mut self) {
        for name in &self.names {
            // With a network goes its end of the cable, and so the other end.
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}
