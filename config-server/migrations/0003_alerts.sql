-- What somebody should be told of. `open_key` is the alert's kind and subject while it is raised, and its id after it was
-- cleared, so that of several config servers one raises it. `gone` is since when its cause is not seen any more; 0 while it is.
CREATE TABLE alerts (
    id TEXT NOT NULL PRIMARY KEY,
    open_key TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    severity TEXT NOT NULL,
    subject TEXT NOT NULL,
    message TEXT NOT NULL,
    mend TEXT NOT NULL,
    raised BIGINT NOT NULL,
    gone BIGINT NOT NULL,
    cleared BIGINT NOT NULL
);
CREATE INDEX alerts_by_raised ON alerts (raised);

-- Messages that are still to be delivered, each to one receiver.
CREATE TABLE notices (
    id TEXT NOT NULL PRIMARY KEY,
    receiver TEXT NOT NULL,
    body TEXT NOT NULL,
    tries BIGINT NOT NULL,
    next_try BIGINT NOT NULL,
    created BIGINT NOT NULL
);
CREATE INDEX notices_by_time ON notices (next_try);
