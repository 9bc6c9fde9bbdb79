-- The state of a fleet. Written so that SQLite and PostgreSQL take the same text: TEXT, and BIGINT for numbers,
-- instants (milliseconds since 1970) and truth (0 or 1); documents are JSON in TEXT.

-- Numbers that grow. `event` and `audit` order what happened; `declared` grows with every change of what is declared,
-- `revoked` with every revocation. A row is locked until its transaction ends, so that numbers become visible in order.
CREATE TABLE counters (name TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL);
INSERT INTO counters (name, value) VALUES ('event', 0), ('audit', 0), ('declared', 1), ('revoked', 0);

CREATE TABLE settings (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE users (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL,
    password TEXT NOT NULL,
    disabled BIGINT NOT NULL,
    created BIGINT NOT NULL
);

CREATE TABLE sessions (
    digest TEXT NOT NULL PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES users (id),
    csrf TEXT NOT NULL,
    expires BIGINT NOT NULL
);
CREATE INDEX sessions_of_user ON sessions (user_id);

CREATE TABLE api_tokens (
    id TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL REFERENCES users (id),
    name TEXT NOT NULL,
    scopes TEXT NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL
);

CREATE TABLE login_attempts (id TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, address TEXT NOT NULL, time BIGINT NOT NULL);
CREATE INDEX login_attempts_by_time ON login_attempts (time);

CREATE TABLE enrol_tokens (
    id TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL,
    name TEXT NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    used_by TEXT NOT NULL
);

-- Agents, process servers and target servers. `live_name` is the name while the part is in the fleet, and the id after
-- it was removed, so that a name can be used again.
CREATE TABLE parts (
    id TEXT NOT NULL PRIMARY KEY,
    role TEXT NOT NULL,
    name TEXT NOT NULL,
    live_name TEXT NOT NULL,
    group_id TEXT NOT NULL,
    enrolled BIGINT NOT NULL,
    removed BIGINT NOT NULL,
    address TEXT NOT NULL,
    sealing_key TEXT NOT NULL,
    version TEXT NOT NULL,
    seen BIGINT NOT NULL,
    silent BIGINT NOT NULL,
    clock_ahead BIGINT NOT NULL,
    certificate_expires BIGINT NOT NULL,
    state TEXT NOT NULL,
    trouble TEXT NOT NULL,
    digest TEXT NOT NULL,
    report TEXT NOT NULL,
    disks TEXT NOT NULL,
    bytes_total BIGINT NOT NULL,
    bytes_free BIGINT NOT NULL,
    UNIQUE (role, live_name)
);
CREATE INDEX parts_by_seen ON parts (silent, seen);

CREATE TABLE certificates (
    serial TEXT NOT NULL PRIMARY KEY,
    part_id TEXT NOT NULL REFERENCES parts (id),
    expires BIGINT NOT NULL,
    revoked BIGINT NOT NULL
);
CREATE INDEX certificates_of_part ON certificates (part_id);

CREATE TABLE policies (
    id TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    policy TEXT NOT NULL,
    changed BIGINT NOT NULL
);

-- `state`: protected; kept (nothing is captured, the points stay); removed.
CREATE TABLE protection_groups (
    id TEXT NOT NULL PRIMARY KEY,
    machine_id TEXT NOT NULL REFERENCES parts (id),
    generation BIGINT NOT NULL,
    state TEXT NOT NULL,
    policy_id TEXT NOT NULL REFERENCES policies (id),
    process_id TEXT NOT NULL REFERENCES parts (id),
    created BIGINT NOT NULL
);
CREATE UNIQUE INDEX groups_of_machine ON protection_groups (machine_id);
CREATE INDEX groups_of_process ON protection_groups (process_id);

CREATE TABLE group_targets (
    group_id TEXT NOT NULL REFERENCES protection_groups (id),
    target_id TEXT NOT NULL REFERENCES parts (id),
    sealed_key TEXT NOT NULL,
    PRIMARY KEY (group_id, target_id)
);
CREATE INDEX groups_of_target ON group_targets (target_id);

CREATE TABLE volumes (
    group_id TEXT NOT NULL REFERENCES protection_groups (id),
    name TEXT NOT NULL,
    device TEXT NOT NULL,
    place BIGINT NOT NULL,
    PRIMARY KEY (group_id, name)
);

-- A job is done by the config server that holds its lease; when the lease ends, any other goes on.
CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    number BIGINT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    subject_id TEXT NOT NULL,
    state TEXT NOT NULL,
    percent BIGINT NOT NULL,
    message TEXT NOT NULL,
    body TEXT NOT NULL,
    steps TEXT NOT NULL,
    created_by TEXT NOT NULL,
    created BIGINT NOT NULL,
    changed BIGINT NOT NULL,
    lease_holder TEXT NOT NULL,
    lease_until BIGINT NOT NULL
);
CREATE INDEX jobs_by_state ON jobs (state, lease_until);
INSERT INTO counters (name, value) VALUES ('job', 0);

-- What parts are to do once, for a job.
CREATE TABLE tasks (
    id TEXT NOT NULL PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (id),
    part_id TEXT NOT NULL REFERENCES parts (id),
    task TEXT NOT NULL,
    state TEXT NOT NULL,
    message TEXT NOT NULL,
    result TEXT NOT NULL,
    created BIGINT NOT NULL
);
CREATE INDEX tasks_of_part ON tasks (part_id, state);
CREATE INDEX tasks_of_job ON tasks (job_id);

CREATE TABLE events (
    id BIGINT NOT NULL PRIMARY KEY,
    time BIGINT NOT NULL,
    kind TEXT NOT NULL,
    severity TEXT NOT NULL,
    subject TEXT NOT NULL,
    message TEXT NOT NULL
);

CREATE TABLE audit (
    id BIGINT NOT NULL PRIMARY KEY,
    time BIGINT NOT NULL,
    who TEXT NOT NULL,
    address TEXT NOT NULL,
    act TEXT NOT NULL,
    what TEXT NOT NULL,
    status BIGINT NOT NULL,
    problem TEXT NOT NULL
);

CREATE TABLE approvals (
    id TEXT NOT NULL PRIMARY KEY,
    act TEXT NOT NULL,
    what TEXT NOT NULL,
    asker_id TEXT NOT NULL,
    asked_by TEXT NOT NULL,
    asked BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    state TEXT NOT NULL,
    answered_by TEXT NOT NULL
);

-- Figures for charts: `step` is the distance between two, in seconds; of each stretch the first report counts.
CREATE TABLE samples (
    group_id TEXT NOT NULL,
    step BIGINT NOT NULL,
    slot BIGINT NOT NULL,
    rpo BIGINT NOT NULL,
    churn BIGINT NOT NULL,
    sent BIGINT NOT NULL,
    dirty BIGINT NOT NULL,
    unsent BIGINT NOT NULL,
    PRIMARY KEY (group_id, step, slot)
);
CREATE INDEX samples_by_age ON samples (step, slot);
