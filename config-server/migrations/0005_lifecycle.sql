-- When a failover was committed, and the machine's disks have not been the newest state since; 0 otherwise.
ALTER TABLE protection_groups ADD COLUMN committed BIGINT NOT NULL DEFAULT 0;
