//! The whole way on this machine, in one process: target server, process server, and the configuration of an agent.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;
use block::{Epoch, GroupId};
use changeset::GroupKey;
use seawall_agent::{Agent, AgentConfig};
use seawall_process_server::ProcessServer;
use seawall_target_server::TargetServer;
use wire::{Authority, Identity, Role};

/// How long a point may take.
const POINT_WAIT: Duration = Duration::from_secs(300);

/// Servers that run.
pub struct Way {
    target: seawall_target_server::Handle,
    process: seawall_process_server::Handle,
    agent: PathBuf,
}

impl Way {
    /// Starts the servers in a directory of their own.
    ///
    /// # Errors
    /// When one of them does not start.
    pub async fn start(dir: &Path, device: &Path, source: &str) -> anyhow::Result<Way> {
        let authority = Authority::create(&dir.join("ca"))?;
        let group = GroupId([9; 16]);
        for (role, name, member) in [
            (Role::Agent, "agent", Some(group)),
            (Role::ProcessServer, "process", None),
            (Role::TargetServer, "target", None),
        ] {
            authority.issue(&Identity::new(role, name, member)?, &dir.join(name))?;
        }
        let key = GroupKey::generate()?.to_hex();
        for name in ["agent", "target"] {
            let path = dir.join(name).join("group.key");
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?
                .write_all_at(key.as_bytes(), 0)?;
        }
        let write = |name: &str, text: String| -> anyhow::Result<std::path::PathBuf> {
            let path = dir.join(name).join("config.toml");
            fs::write(&path, text)?;
            Ok(path)
        };
        let target = write(
            "target",
            format!(
                "listen = \"127.0.0.1:0\"\ncredentials = \".\"\ndata = \"data\"\n[[group]]\nid = \"{group}\"\nkey = \"group.key\"\n"
            ),
        )?;
        let target = TargetServer::start(seawall_target_server::Config::load(&target)?).await?;
        let process = write(
            "process",
            format!(
                "[process_server]\nlisten = \"127.0.0.1:0\"\ncredentials = \".\"\ncache = \"cache\"\ncache_bytes = \"4GiB\"\n\
                 [[group]]\nid = \"{group}\"\ntargets = [\"{}\"]\n",
                target.local_addr()
            ),
        )?;
        let process = ProcessServer::start(seawall_process_server::Config::load(&process)?).await?;
        let agent = write(
            "agent",
            format!(
                "[agent]\ngroup = \"{group}\"\ngroup_key = \"group.key\"\ncredentials = \".\"\nprocess_server = \"{}\"\n\
                 source = \"{source}\"\nkeep_tracking = false\n[[volume]]\nname = \"disk\"\ndevice = \"{}\"\n",
                process.local_addr(),
                device.display()
            ),
        )?;
        Ok(Way { target, process, agent })
    }

    /// Starts the agent and waits for a point that is newer than `after`. Gives the time that took, and the agent.
    ///
    /// # Errors
    /// When the agent does not start, or there is no point in time.
    pub async fn replicate(&self, after: Epoch) -> anyhow::Result<(Duration, Agent)> {
        let mut config = AgentConfig::load(&self.agent)?;
        // Not at a certain hour only.
        config.resync.window.clear();
        let began = Instant::now();
        let agent = tokio::task::block_in_place(|| Agent::start(config))?;
        while self.newest() <= after {
            ensure!(began.elapsed() < POINT_WAIT, "no recovery point: {:?}", agent.report());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok((began.elapsed(), agent))
    }

    /// The newest point at the target.
    pub fn newest(&self) -> Epoch {
        let groups = self.target.status().groups;
        groups
            .iter()
            .filter_map(|group| group.newest_point.as_ref())
            .map(|point| point.epoch)
            .max()
            .unwrap_or_default()
    }

    /// Stops the servers.
    ///
    /// # Errors
    /// When the cache cannot be closed.
    pub async fn shutdown(self) -> anyhow::Result<()> {
        self.process.shutdown().await?;
        self.target.shutdown().await;
        Ok(())
    }
}
