//! A process server between agents and target servers, over real connections.

mod support;

use block::{ByteCount, Epoch};
use control::{ServerStatus, StateCode};
use seawall_process_server::{Handle, ProcessServer, StartError, verify};
use support::*;
use wire::{Listener, RefusalCode, Role, Sender, WireError};

async fn started(config: seawall_process_server::Config) -> (Handle, String) {
    let server = ProcessServer::start(config).await.unwrap();
    let address = server.local_addr().to_string();
    (server, address)
}

fn code<T>(result: Result<T, WireError>) -> RefusalCode {
    match result {
        Err(error) => error.refusal().unwrap_or_else(|| panic!("{error}")),
        Ok(_) => panic!("not refused"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changesets_are_cached_forwarded_in_order_and_acknowledged() {
    let world = World::new();
    let (a, b) = (world.target("a").await, world.target("b").await);
    let (server, address) = started(world.config(&[(group(1), &[&a, &b]), (group(2), &[&a])])).await;
    let mut one = world.agent(&address, 1, 1).await.unwrap();
    let mut two = world.agent(&address, 2, 3).await.unwrap();
    let sizes = [0, 10, 300_000, 5_000_000, 20_000_000, 1 << 20];
    for (index, size) in sizes.into_iter().enumerate() {
        one.put(index as u64 + 1, size).await.unwrap();
        two.put(index as u64 + 1, 1000).await.unwrap();
    }
    one.sender.report(r#"{"nonsense":1}"#).await.unwrap();
    let report = control::AgentReport { captured: Epoch(9), sealed: Epoch(6), ..Default::default() };
    one.sender.report(&serde_json::to_string(&report).unwrap()).await.unwrap();
    one.wait_applied(6).await;
    two.wait_applied(6).await;
    let expected: Vec<_> =
        sizes.iter().enumerate().map(|(index, size)| (1, index as u64 + 1, *size)).collect();
    a.assert_got(1, &expected);
    b.assert_got(1, &expected);
    assert_eq!(a.got(2).len(), 6);
    assert!(b.got(2).is_empty());

    until("the report", || server.status().groups[0].report.is_some()).await;
    let json = world.operator(&address, r#"{"request":"status"}"#).await.unwrap();
    let ServerStatus::ProcessServer(status) = serde_json::from_str(&json).unwrap() else { panic!("{json}") };
    assert_eq!((status.state, status.groups.len()), (StateCode::Replicating, 2));
    let shown = &status.groups[0];
    assert_eq!((shown.cached, shown.agent.as_deref()), (Epoch(6), Some("agent1")));
    assert_eq!(shown.report.as_ref().unwrap().captured, Epoch(9));
    assert!(shown.targets.iter().all(|target| target.connected && target.applied == Epoch(6)));
    assert_eq!(shown.received_bytes_total.get(), sizes.iter().sum::<usize>() as u64);
    assert!(status.fsync_ms_p99 > 0.0);
    assert_eq!(code(world.operator(&address, r#"{"request":"points"}"#).await), RefusalCode::BadRequest);
    assert_eq!(code(world.operator(&address, "{").await), RefusalCode::BadRequest);

    server.shutdown().await.unwrap();
    assert!(verify(&cache_dir(&world)).unwrap().is_sound());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_comes_back_gets_what_it_lacks() {
    let world = World::new();
    let (a, b) = (world.target("a").await, world.target("b").await);
    let b_address = b.address.clone();
    let (server, address) = started(world.config(&[(group(1), &[&a, &b])])).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    agent.put(1, 1000).await.unwrap();
    agent.wait_applied(1).await;
    let disk = b.stop().await;
    for epoch in 2..=9 {
        agent.put(epoch, 700_000).await.unwrap();
    }
    agent.wait_cached(9).await;
    until("a gets on without b", || a.got(1).len() == 9).await;
    until("b is seen to be away", || server.status().groups[0].state == StateCode::Unreachable).await;
    assert_eq!(agent.held.applied, Epoch(1));
    // Everything is started again; what was held is forwarded without the agent.
    drop(agent);
    server.shutdown().await.unwrap();
    let listener = Listener::bind(&b_address, world.load(Role::TargetServer, "b", None)).await.unwrap();
    let b = Target::run(listener, disk);
    let (server, address) = started(world.config(&[(group(1), &[&a, &b])])).await;
    until("b catches up", || b.got(1).len() == 9).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    assert_eq!(agent.held.held, Epoch(9));
    agent.put(10, 5).await.unwrap();
    agent.wait_applied(10).await;
    let expected: Vec<_> = (1..=10)
        .map(|epoch| {
            (
                1,
                epoch,
                match epoch {
                    1 => 1000,
                    10 => 5,
                    _ => 700_000,
                },
            )
        })
        .collect();
    a.assert_got(1, &expected);
    b.assert_got(1, &expected);
    server.shutdown().await.unwrap();
}

/// Once lost: the agent left before its last changeset was durable, and nobody told the forwarders of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_left_behind_is_forwarded() {
    let world = World::new();
    let a = world.target("a").await;
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    for epoch in 1..=10 {
        let mut agent = world.agent(&address, 1, 1).await.unwrap();
        if agent.held.held.next() == Epoch(epoch) {
            agent.put(epoch, 2_000_000).await.unwrap();
        }
        drop(agent);
        until("it is forwarded", || a.got(1).len() as u64 >= epoch).await;
    }
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_makes_the_agent_wait_and_loses_nothing() {
    let world = World::new();
    let a = world.target("a").await;
    a.change(|state| state.stuck = true);
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    let size = 30 << 20;
    let pushing = tokio::spawn(async move {
        for epoch in 1..=10 {
            agent.put(epoch, size).await.unwrap();
        }
        agent.wait_applied(10).await;
    });
    until("the cache is full", || server.status().state == StateCode::CacheFull).await;
    let status = server.status();
    assert!(status.cache_used <= status.cache_limit);
    assert!(status.groups[0].cached < Epoch(10));
    a.change(|state| state.stuck = false);
    tokio::time::timeout(HANG, pushing).await.expect("hangs").unwrap();
    a.assert_got(1, &(1..=10).map(|epoch| (1, epoch, size)).collect::<Vec<_>>());
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn order_is_kept_against_replays_and_gaps() {
    let world = World::new();
    let a = world.target("a").await;
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    for (wrong, refusal) in [(3, RefusalCode::Replayed), (5, RefusalCode::Gap)] {
        let mut agent = world.agent(&address, 1, 1).await.unwrap();
        for epoch in agent.held.held.0 + 1..=3 {
            agent.put(epoch, 100).await.unwrap();
            agent.wait_cached(epoch).await;
        }
        // The refusal may come while the changeset is still being sent.
        let refused = match agent.put(wrong, 100).await {
            Ok(()) => code(agent.wait(|_| false).await),
            Err(error) => code::<()>(Err(error)),
        };
        assert_eq!(refused, refusal);
    }
    let mut newer = world.agent(&address, 1, 2).await.unwrap();
    assert_eq!(newer.held.held, Epoch::NONE);
    newer.put(1, 100).await.unwrap();
    newer.wait_applied(1).await;
    assert_eq!(code(world.agent(&address, 1, 1).await), RefusalCode::Generation);
    a.assert_got(1, &[(1, 1, 100), (1, 2, 100), (1, 3, 100), (2, 1, 100)]);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_generation_gives_way_to_the_next() {
    let world = World::new();
    let a = world.target("a").await;
    a.change(|state| state.stuck = true);
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    agent.put(1, 100).await.unwrap();
    agent.wait_cached(1).await;
    server.shutdown().await.unwrap();
    // Failed over meanwhile: the old generation is refused from now on.
    a.change(|state| (state.fence, state.stuck) = (2, false));
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    until("the target refuses", || server.status().groups[0].state == StateCode::Fenced).await;
    assert!(server.status().groups[0].last_error.as_ref().unwrap().contains("fenced"));
    let mut agent = world.agent(&address, 1, 2).await.unwrap();
    agent.put(1, 77).await.unwrap();
    agent.wait_applied(1).await;
    let got: Vec<_> = a.got(1).into_iter().filter(|(generation, ..)| *generation == 2).collect();
    assert_eq!(got.len(), 1);
    until("what nobody takes is freed", || server.status().groups[0].cached_bytes == ByteCount::ZERO).await;
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_by_name() {
    let world = World::new();
    let a = world.target("a").await;
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    assert_eq!(code(world.agent(&address, 2, 1).await), RefusalCode::UnknownGroup);
    // Another process server, which the wire would let deliver.
    let other = world.load(Role::ProcessServer, "other", None);
    let connection = wire::connect(&address, Role::ProcessServer, &other).await.unwrap();
    let opened = Sender::open(connection, group(1), block::Generation(1)).await;
    assert_eq!(code(opened), RefusalCode::Unauthorised);
    // An agent for the group of another.
    let agent = world.load(Role::Agent, "agent1", Some(group(1)));
    let connection = wire::connect(&address, Role::ProcessServer, &agent).await.unwrap();
    let opened = Sender::open(connection, group(3), block::Generation(1)).await;
    assert_eq!(code(opened), RefusalCode::WrongGroup);
    // A stranger's certificate is as good as none.
    let elsewhere = World::new();
    assert!(matches!(elsewhere.agent(&address, 1, 1).await, Err(WireError::Tls { .. })));
    assert!(server.status().groups.is_empty());
    server.shutdown().await.unwrap();
}

/// A cloned machine has its original's credentials. While the original delivers, the clone must not take its place: two
/// histories would be mixed. A connection that went silent is another matter.
#[tokio::test(flavor = "multi_thread")]
async fn a_living_agent_keeps_its_group_and_a_silent_one_is_replaced() {
    let world = World::new();
    let a = world.target("a").await;
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    let mut original = world.agent(&address, 1, 1).await.unwrap();
    original.put(1, 100).await.unwrap();
    original.wait_cached(1).await;
    let alive = tokio::spawn(async move {
        for _ in 0..20 {
            original.sender.report("{}").await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        original
    });
    assert_eq!(code(world.agent(&address, 1, 1).await), RefusalCode::Busy);
    let mut original = alive.await.unwrap();
    let mut second = world.agent(&address, 1, 1).await.unwrap();
    assert_eq!(second.held.held, Epoch(1));
    assert_eq!(code(original.wait(|_| false).await), RefusalCode::Superseded);
    second.put(2, 100).await.unwrap();
    second.wait_applied(2).await;
    // One that has gone in good order is replaced at once.
    drop(second);
    let mut third = world.agent(&address, 1, 1).await.unwrap();
    third.put(3, 100).await.unwrap();
    third.wait_applied(3).await;
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_of_another_history_gets_nothing() {
    let world = World::new();
    let a = world.target("a").await;
    // It cannot be asked at first, so that the cache begins as for a new group.
    a.change(|state| state.refuse = Some(RefusalCode::Busy));
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    for epoch in 1..=8 {
        agent.put(epoch, 10).await.unwrap();
    }
    agent.wait_cached(8).await;
    a.change(|state| {
        state.got.insert(group(1), (1..=5).map(|epoch| (1, epoch, content(1, epoch, 10))).collect());
        state.refuse = None;
    });
    until("it is stopped", || server.status().groups[0].targets[0].state == StateCode::Gap).await;
    assert_eq!(a.got(1).len(), 5);
    // A new generation mends it.
    drop(agent);
    let mut agent = world.agent(&address, 1, 2).await.unwrap();
    agent.put(1, 10).await.unwrap();
    agent.wait_applied(1).await;
    assert_eq!(a.got(1).len(), 6);
    server.shutdown().await.unwrap();
}

/// A process server was lost with its cache. An empty one in its place asks the targets where to go on, and says that it did, until
/// it holds something of its own.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_cache_goes_on_after_what_its_targets_hold() {
    let world = World::new();
    let (a, b) = (world.target("a").await, world.target("b").await);
    a.change(|state| {
        state.got.insert(group(1), (1..=5).map(|epoch| (1, epoch, content(1, epoch, 10))).collect());
    });
    b.change(|state| {
        state.got.insert(group(1), (1..=3).map(|epoch| (1, epoch, content(1, epoch, 10))).collect());
    });
    let config = world.config(&[(group(1), &[&a, &b]), (group(2), &[&a])]);
    let (server, address) = started(config.clone()).await;
    let agent = world.agent(&address, 1, 1).await.unwrap();
    assert_eq!((agent.held.held, agent.sender.rebased()), (Epoch(5), true));
    drop(agent);
    // What it has said outlives it.
    server.shutdown().await.unwrap();
    let (server, address) = started(config.clone()).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    assert_eq!((agent.held.held, agent.sender.rebased()), (Epoch(5), true));
    agent.put(6, 1000).await.unwrap();
    agent.wait_cached(6).await;
    until("the one that held most goes on", || a.got(1).len() == 6).await;
    // The other lacks what nobody has any more.
    let state = |server: &Handle, target: usize| server.status().groups[0].targets[target].state;
    until("the gap is said", || state(&server, 1) == StateCode::Gap).await;
    assert_eq!(b.got(1).len(), 3);
    drop(agent);
    let agent = world.agent(&address, 1, 1).await.unwrap();
    assert!(!agent.sender.rebased());
    // A new group is just that.
    let agent = world.agent(&address, 2, 1).await.unwrap();
    assert_eq!((agent.held.held, agent.sender.rebased()), (Epoch::NONE, false));
    drop(agent);
    server.shutdown().await.unwrap();
    assert!(verify(&cache_dir(&world)).unwrap().is_sound());
}

/// A target that comes when what was before is freed, or has lost its files, is sent what follows. The agent hears that it was never
/// compared, until it goes away.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_has_nothing_begins_in_the_middle() {
    let world = World::new();
    let (a, b) = (world.target("a").await, world.target("b").await);
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    for epoch in 1..=4 {
        agent.put(epoch, 1000).await.unwrap();
    }
    agent.wait_applied(4).await;
    until("it is freed", || server.status().groups[0].cached_bytes == ByteCount::ZERO).await;
    drop(agent);
    server.shutdown().await.unwrap();

    let unproven = |bytes| wire::Condition { unproven: ByteCount(bytes), ..Default::default() };
    b.change(|state| state.condition = Some(unproven(4096)));
    let (server, address) = started(world.config(&[(group(1), &[&a, &b])])).await;
    let forwarded = |target: usize| server.status().groups[0].targets[target].state == StateCode::Replicating;
    until("both are forwarded to", || forwarded(0) && forwarded(1)).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    assert_eq!((agent.held.held, agent.sender.rebased()), (Epoch(4), false));
    let mut told = agent.receipts.condition();
    agent.put(5, 1000).await.unwrap();
    agent.wait_applied(5).await;
    b.assert_got(1, &[(1, 5, 1000)]);
    told.wait_for(|told| *told == Some(unproven(4096))).await.unwrap();

    // Its files are gone: it begins again.
    b.change(|state| {
        state.got.clear();
        state.refuse = Some(RefusalCode::Busy);
    });
    b.cut();
    told.wait_for(|told| *told == Some(unproven(0))).await.unwrap();
    agent.put(6, 1000).await.unwrap();
    agent.wait_cached(6).await;
    until("the other one frees nothing that it lacks", || a.got(1).len() == 6).await;
    b.change(|state| state.refuse = None);
    until("both are forwarded to again", || forwarded(0) && forwarded(1)).await;
    agent.put(7, 1000).await.unwrap();
    agent.wait_applied(7).await;
    assert_eq!(b.got(1).last().map(|got| got.1), Some(7));
    assert_eq!(a.got(1).len(), 7);
    drop(agent);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_a_target_are_named() {
    let world = World::new();
    let a = world.target("a").await;
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    a.change(|state| state.refuse = Some(RefusalCode::UnknownGroup));
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    agent.put(1, 10).await.unwrap();
    until("it is named", || server.status().groups[0].state == StateCode::Misconfigured).await;
    let status = server.status();
    assert!(status.groups[0].last_error.as_ref().unwrap().contains(&a.address));
    assert!(!status.groups[0].targets[0].connected);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn it_does_not_start_with_the_wrong_credentials_or_twice() {
    let world = World::new();
    let a = world.target("a").await;
    let mut config = world.config(&[(group(1), &[&a])]);
    let (server, _) = started(config.clone()).await;
    assert!(matches!(ProcessServer::start(config.clone()).await, Err(StartError::Cache(_))));
    server.shutdown().await.unwrap();
    config.process_server.credentials = world.credentials(Role::TargetServer, "a", None);
    let error = ProcessServer::check(&config).unwrap_err();
    assert!(error.to_string().contains("expected a process-server"), "{error}");
    config.process_server.cache_bytes = ByteCount::mib(1);
    assert!(matches!(ProcessServer::check(&config), Err(StartError::Config(_))));
}

/// Comparisons read whole disks. Only so many go on at a time; the others hear how many are before them, and come in when
/// one ends, however it ends.
#[tokio::test(flavor = "multi_thread")]
async fn comparisons_take_turns() {
    let world = World::new();
    let target = world.target("t").await;
    let mut config = world.config(&[(group(1), &[&target]), (group(2), &[&target]), (group(3), &[&target])]);
    config.process_server.resyncs_at_once = 1;
    let (server, address) = started(config).await;
    let mut one = world.comparison(&address, 1).await;
    assert_eq!(one.turn().await.unwrap().ahead, 0);
    let mut two = world.comparison(&address, 2).await;
    assert_eq!(two.turn().await.unwrap(), wire::Turn { ahead: 1, at_once: 1 });
    let mut three = world.comparison(&address, 3).await;
    assert_eq!(three.turn().await.unwrap().ahead, 2);
    assert_eq!((server.status().resyncs, server.status().resyncs_waiting), (1, 2));
    one.send(7, b"question".as_slice().into()).await.unwrap();
    assert_eq!(one.next().await.unwrap(), (7, b"question".as_slice().into()));
    // One that waits gives up.
    drop(two);
    until("the second has left", || server.status().resyncs_waiting == 1).await;
    drop(one);
    loop {
        match three.turn().await.unwrap().ahead {
            0 => break,
            ahead => assert_eq!(ahead, 1),
        }
    }
    three.send(1, b"mine".as_slice().into()).await.unwrap();
    assert_eq!(three.next().await.unwrap().0, 1);
    // What a target says of its replica reaches the agent.
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    let mut told = agent.receipts.condition();
    agent.put(1, 1000).await.unwrap();
    agent.wait_applied(1).await;
    let condition = wire::Condition { has_point: true, damaged: ByteCount(4096), ..Default::default() };
    target.change(|applied| applied.condition = Some(condition));
    agent.put(2, 1000).await.unwrap();
    told.wait_for(|told| *told == Some(condition)).await.unwrap();
    server.shutdown().await.unwrap();
}

/// A failover numbers epochs on: the next generation begins at the cache where its target says, and nothing of the old one is in the
/// way. While the target cannot be asked, or is of the old generation, the agent waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_generation_after_a_failover_begins_where_its_target_is() {
    let world = World::new();
    let a = world.target("a").await;
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    for epoch in 1..=3 {
        agent.put(epoch, 100).await.unwrap();
    }
    agent.wait_applied(3).await;
    a.change(|state| state.stuck = true);
    agent.put(4, 100).await.unwrap();
    agent.wait_cached(4).await;
    drop(agent);
    // The source is back before anybody has failed over: the target knows nothing of its generation.
    a.change(|state| state.refuse = Some(RefusalCode::Generation));
    assert_eq!(code(world.agent(&address, 1, 2).await), RefusalCode::Generation);
    a.change(|state| state.refuse = Some(RefusalCode::Stopping));
    assert_eq!(code(world.agent(&address, 1, 2).await), RefusalCode::Busy);
    a.change(|state| {
        (state.fence, state.stuck, state.refuse) = (2, false, None);
        state.begins.insert(2, 6);
    });
    let mut agent = world.agent(&address, 1, 2).await.unwrap();
    assert_eq!(agent.sender.held().held, Epoch(6));
    assert!(agent.sender.rebased());
    agent.put(7, 77).await.unwrap();
    agent.wait_applied(7).await;
    let got: Vec<_> = a.got(1).into_iter().filter(|(generation, ..)| *generation == 2).collect();
    assert_eq!(got.len(), 1);
    until("nothing of the old generation is kept", || {
        server.status().groups[0].cached_bytes == ByteCount::ZERO
    })
    .await;
    server.shutdown().await.unwrap();
    // The old source is fenced here too, also after a restart.
    let (server, address) = started(world.config(&[(group(1), &[&a])])).await;
    assert_eq!(code(world.agent(&address, 1, 1).await), RefusalCode::Generation);
    server.shutdown().await.unwrap();
}
