CREATE INDEX polar_api_key_by_id ON polar_api_key (key_id, seq);
CREATE INDEX polar_budget_by_scope ON polar_budget (tenant, level, name);
CREATE INDEX polar_credit_note_by_statement ON polar_credit_note (statement);
CREATE INDEX polar_entry_by_account ON polar_entry (tenant, account, currency);
CREATE INDEX polar_hold_by_tenant ON polar_hold (tenant, at);
CREATE INDEX polar_hold_open ON polar_hold (tenant, expires_at) WHERE state = 'held';
CREATE INDEX polar_pruned_by_prune ON polar_pruned (prune_id);
CREATE INDEX polar_reply_by_expiry ON polar_reply (expires_at);
CREATE INDEX polar_statement_by_tenant ON polar_statement (tenant, since);
CREATE INDEX polar_usage_by_tenant ON polar_usage (tenant, started_at);
CREATE INDEX polar_usage_by_time ON polar_usage (started_at);
CREATE INDEX polar_usage_hour_by_tenant ON polar_usage_hour (tenant, hour);
CREATE INDEX polar_usage_hour_by_time ON polar_usage_hour (hour);
CREATE TABLE polar_api_key (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	key_id VARCHAR(16) NOT NULL,
	name VARCHAR(200) NOT NULL,
	secret_hash VARCHAR(64) NOT NULL,
	tags TEXT NOT NULL,
	scopes TEXT NOT NULL,
	models TEXT NOT NULL,
	tiers TEXT NOT NULL,
	max_tokens INTEGER,
	requests_per_minute INTEGER,
	tokens_per_minute INTEGER,
	parallel INTEGER,
	not_before BIGINT NOT NULL,
	expires_at BIGINT,
	rotated_from VARCHAR(16),
	revoked INTEGER NOT NULL,
	set_at BIGINT NOT NULL
);
CREATE TABLE polar_budget (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	level VARCHAR(10) NOT NULL,
	name VARCHAR(200) NOT NULL,
	unit VARCHAR(3) NOT NULL,
	time_window VARCHAR(10) NOT NULL,
	limit_count BIGINT NOT NULL,
	decimals INTEGER NOT NULL,
	zone VARCHAR(100) NOT NULL,
	over_budget VARCHAR(10) NOT NULL,
	closed INTEGER NOT NULL,
	set_at BIGINT NOT NULL
);
CREATE TABLE polar_budget_counter (
	seq INTEGER NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	level VARCHAR(10) NOT NULL,
	name VARCHAR(200) NOT NULL,
	unit VARCHAR(3) NOT NULL,
	time_window VARCHAR(10) NOT NULL,
	starts BIGINT NOT NULL,
	ends BIGINT NOT NULL,
	decimals INTEGER NOT NULL,
	spent BIGINT NOT NULL,
	held BIGINT NOT NULL,
	PRIMARY KEY (seq),
	CONSTRAINT polar_budget_counter_once UNIQUE (tenant, level, name, unit, time_window, starts),
	CONSTRAINT polar_budget_counter_not_negative CHECK (spent >= 0 AND held >= 0)
);
CREATE TABLE polar_chain_anchor (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	version INTEGER NOT NULL,
	links BIGINT NOT NULL,
	head BLOB NOT NULL,
	anchored_at BIGINT NOT NULL,
	CONSTRAINT polar_chain_anchor_once UNIQUE (tenant)
);
CREATE TABLE polar_chain_head (
	tenant VARCHAR(200) NOT NULL,
	number BIGINT NOT NULL,
	hash BLOB NOT NULL,
	PRIMARY KEY (tenant)
);
CREATE TABLE polar_chain_link (
	tenant VARCHAR(200) NOT NULL,
	number BIGINT NOT NULL,
	subject VARCHAR(40) NOT NULL,
	"key" VARCHAR(100) NOT NULL,
	digest BLOB NOT NULL,
	previous BLOB NOT NULL,
	hash BLOB NOT NULL,
	PRIMARY KEY (tenant, number)
)
 WITHOUT ROWID;
CREATE TABLE polar_clock (
	id INTEGER NOT NULL,
	boot VARCHAR(200) NOT NULL,
	ahead BIGINT NOT NULL,
	PRIMARY KEY (id),
	CONSTRAINT polar_clock_is_one CHECK (id = 1)
);
CREATE TABLE polar_credit_note (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	statement INTEGER NOT NULL,
	reference VARCHAR(200) NOT NULL,
	amount TEXT NOT NULL,
	reason TEXT NOT NULL,
	issued_at BIGINT NOT NULL,
	CONSTRAINT polar_credit_note_once UNIQUE (tenant, reference),
	FOREIGN KEY(statement) REFERENCES polar_statement (number)
);
CREATE TABLE polar_entry (
	transaction_id INTEGER NOT NULL,
	line INTEGER NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	account VARCHAR(40) NOT NULL,
	currency VARCHAR(3) NOT NULL,
	whole BIGINT NOT NULL,
	rest BIGINT NOT NULL,
	PRIMARY KEY (transaction_id, line),
	FOREIGN KEY(transaction_id) REFERENCES polar_transaction (id)
);
CREATE TABLE polar_hold (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	request_id VARCHAR(200) NOT NULL,
	attempt INTEGER NOT NULL,
	project TEXT,
	user_name TEXT,
	key_name TEXT,
	at BIGINT NOT NULL,
	fingerprint VARCHAR(64) NOT NULL,
	offer INTEGER NOT NULL,
	currency VARCHAR(3) NOT NULL,
	cost_bound BIGINT NOT NULL,
	flops_bound BIGINT NOT NULL,
	held_at BIGINT NOT NULL,
	expires_at BIGINT NOT NULL,
	state VARCHAR(10) NOT NULL,
	resolved_at BIGINT,
	cost BIGINT,
	flops INTEGER,
	CONSTRAINT polar_hold_once UNIQUE (tenant, source, request_id, attempt),
	CONSTRAINT polar_hold_state CHECK (state IN ('held', 'settled', 'released', 'expired')),
	CONSTRAINT polar_hold_resolved CHECK ((state = 'held') = (resolved_at IS NULL))
);
CREATE TABLE polar_price_book (
	hash VARCHAR(64) NOT NULL,
	id VARCHAR(100) NOT NULL,
	document TEXT NOT NULL,
	stored_at BIGINT NOT NULL,
	PRIMARY KEY (hash)
);
CREATE TABLE polar_price_in_force (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	price_book_hash VARCHAR(64) NOT NULL,
	for_all INTEGER NOT NULL,
	put_at BIGINT NOT NULL,
	FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
);
CREATE TABLE polar_probe (
	payload TEXT NOT NULL
);
CREATE TABLE polar_prune (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	"before" BIGINT NOT NULL,
	pruned_at BIGINT NOT NULL,
	requests BIGINT NOT NULL,
	totals TEXT NOT NULL
);
CREATE TABLE polar_pruned (
	seq INTEGER NOT NULL,
	prune_id INTEGER NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	request_id VARCHAR(200) NOT NULL,
	content_hash VARCHAR(64) NOT NULL,
	stored_at BIGINT NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	cost BIGINT,
	unrated TEXT,
	PRIMARY KEY (seq),
	CONSTRAINT polar_pruned_once UNIQUE (tenant, source, request_id),
	FOREIGN KEY(prune_id) REFERENCES polar_prune (id)
);
CREATE TABLE polar_receipt (
	usage_seq INTEGER NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	cost BIGINT,
	unrated TEXT,
	PRIMARY KEY (usage_seq),
	FOREIGN KEY(usage_seq) REFERENCES polar_usage (seq),
	FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
);
CREATE TABLE polar_reply (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	key_hash VARCHAR(64) NOT NULL,
	fingerprint VARCHAR(64) NOT NULL,
	state VARCHAR(10) NOT NULL,
	answer BLOB,
	claimed_at BIGINT NOT NULL,
	expires_at BIGINT NOT NULL,
	CONSTRAINT polar_reply_once UNIQUE (tenant, key_hash),
	CONSTRAINT polar_reply_state CHECK ((state = 'running') = (answer IS NULL))
);
CREATE TABLE polar_schema (
	version INTEGER NOT NULL,
	applied_at BIGINT NOT NULL,
	PRIMARY KEY (version)
);
CREATE TABLE polar_statement (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	since BIGINT NOT NULL,
	until BIGINT NOT NULL,
	currency VARCHAR(3) NOT NULL,
	id VARCHAR(40) NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	seq_until BIGINT NOT NULL,
	late TEXT NOT NULL,
	issued_at BIGINT NOT NULL,
	document TEXT NOT NULL,
	CONSTRAINT polar_statement_once UNIQUE (id),
	FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
);
CREATE TABLE polar_transaction (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	kind VARCHAR(40) NOT NULL,
	reference VARCHAR(200) NOT NULL,
	effective_at BIGINT NOT NULL,
	booked_at BIGINT NOT NULL,
	corrects INTEGER,
	note TEXT,
	CONSTRAINT polar_transaction_once UNIQUE (tenant, kind, reference),
	FOREIGN KEY(corrects) REFERENCES polar_transaction (id)
);
CREATE TABLE polar_usage (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	tenant VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	request_id VARCHAR(200) NOT NULL,
	content_hash VARCHAR(64) NOT NULL,
	record_version INTEGER NOT NULL,
	started_at BIGINT NOT NULL,
	stored_at BIGINT NOT NULL,
	tags TEXT NOT NULL,
	model VARCHAR(200) NOT NULL,
	model_fingerprint VARCHAR(200) NOT NULL,
	router VARCHAR(200) NOT NULL,
	router_version VARCHAR(200) NOT NULL,
	tier VARCHAR(200),
	program TEXT NOT NULL,
	outcome VARCHAR(20) NOT NULL,
	finish_reason VARCHAR(20) NOT NULL,
	error TEXT,
	tokens_input BIGINT NOT NULL,
	tokens_cached BIGINT NOT NULL,
	tokens_output BIGINT NOT NULL,
	visits_prefill TEXT NOT NULL,
	visits_decode TEXT NOT NULL,
	flops_embed BIGINT NOT NULL,
	flops_layers_prefill BIGINT NOT NULL,
	flops_layers_decode BIGINT NOT NULL,
	flops_head BIGINT NOT NULL,
	flops_router BIGINT NOT NULL,
	flops_total BIGINT NOT NULL,
	flops_formula VARCHAR(50) NOT NULL,
	identity_flops BIGINT NOT NULL,
	kv_bytes_peak BIGINT NOT NULL,
	device TEXT NOT NULL,
	dtype TEXT NOT NULL,
	queue_ns BIGINT NOT NULL,
	prefill_ns BIGINT NOT NULL,
	decode_ns BIGINT NOT NULL,
	loops_stopped BIGINT DEFAULT '0' NOT NULL,
	visits_prefill_filled TEXT,
	CONSTRAINT polar_usage_once UNIQUE (tenant, source, request_id)
);
CREATE TABLE polar_usage_hour (
	id BLOB NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	hour BIGINT NOT NULL,
	tier VARCHAR(200) NOT NULL,
	model VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	outcome VARCHAR(20) NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	unrated TEXT NOT NULL,
	requests BIGINT NOT NULL,
	tokens_input_millions BIGINT NOT NULL,
	tokens_input_rest BIGINT NOT NULL,
	tokens_cached_millions BIGINT NOT NULL,
	tokens_cached_rest BIGINT NOT NULL,
	tokens_output_millions BIGINT NOT NULL,
	tokens_output_rest BIGINT NOT NULL,
	visits_millions BIGINT NOT NULL,
	visits_rest BIGINT NOT NULL,
	flops_millions BIGINT NOT NULL,
	flops_rest BIGINT NOT NULL,
	identity_flops_millions BIGINT NOT NULL,
	identity_flops_rest BIGINT NOT NULL,
	cost_millions BIGINT NOT NULL,
	cost_rest BIGINT NOT NULL,
	PRIMARY KEY (id)
);
CREATE TRIGGER polar_api_key_no_delete BEFORE DELETE ON polar_api_key BEGIN SELECT RAISE(ABORT, 'polar_api_key is append-only'); END;
CREATE TRIGGER polar_api_key_no_replace BEFORE INSERT ON polar_api_key WHEN EXISTS (SELECT 1 FROM polar_api_key WHERE seq = NEW.seq) BEGIN SELECT RAISE(FAIL, 'polar_api_key is append-only'); END;
CREATE TRIGGER polar_api_key_no_update BEFORE UPDATE ON polar_api_key BEGIN SELECT RAISE(ABORT, 'polar_api_key is append-only'); END;
CREATE TRIGGER polar_budget_no_delete BEFORE DELETE ON polar_budget BEGIN SELECT RAISE(ABORT, 'polar_budget is append-only'); END;
CREATE TRIGGER polar_budget_no_replace BEFORE INSERT ON polar_budget WHEN EXISTS (SELECT 1 FROM polar_budget WHERE seq = NEW.seq) BEGIN SELECT RAISE(FAIL, 'polar_budget is append-only'); END;
CREATE TRIGGER polar_budget_no_update BEFORE UPDATE ON polar_budget BEGIN SELECT RAISE(ABORT, 'polar_budget is append-only'); END;
CREATE TRIGGER polar_chain_anchor_no_delete BEFORE DELETE ON polar_chain_anchor BEGIN SELECT RAISE(ABORT, 'polar_chain_anchor is append-only'); END;
CREATE TRIGGER polar_chain_anchor_no_replace BEFORE INSERT ON polar_chain_anchor WHEN EXISTS (SELECT 1 FROM polar_chain_anchor WHERE id = NEW.id OR tenant = NEW.tenant) BEGIN SELECT RAISE(FAIL, 'polar_chain_anchor is append-only'); END;
CREATE TRIGGER polar_chain_anchor_no_update BEFORE UPDATE ON polar_chain_anchor BEGIN SELECT RAISE(ABORT, 'polar_chain_anchor is append-only'); END;
CREATE TRIGGER polar_chain_head_forward BEFORE UPDATE ON polar_chain_head WHEN NEW.number <= OLD.number BEGIN SELECT RAISE(ABORT, 'polar_chain_head only moves forward'); END;
CREATE TRIGGER polar_chain_head_no_delete BEFORE DELETE ON polar_chain_head BEGIN SELECT RAISE(ABORT, 'polar_chain_head only moves forward'); END;
CREATE TRIGGER polar_chain_link_no_delete BEFORE DELETE ON polar_chain_link BEGIN SELECT RAISE(ABORT, 'polar_chain_link is append-only'); END;
CREATE TRIGGER polar_chain_link_no_update BEFORE UPDATE ON polar_chain_link BEGIN SELECT RAISE(ABORT, 'polar_chain_link is append-only'); END;
CREATE TRIGGER polar_credit_note_no_delete BEFORE DELETE ON polar_credit_note BEGIN SELECT RAISE(ABORT, 'polar_credit_note is append-only'); END;
CREATE TRIGGER polar_credit_note_no_replace BEFORE INSERT ON polar_credit_note WHEN EXISTS (SELECT 1 FROM polar_credit_note WHERE number = NEW.number OR (tenant = NEW.tenant AND reference = NEW.reference)) BEGIN SELECT RAISE(FAIL, 'polar_credit_note is append-only'); END;
CREATE TRIGGER polar_credit_note_no_update BEFORE UPDATE ON polar_credit_note BEGIN SELECT RAISE(ABORT, 'polar_credit_note is append-only'); END;
CREATE TRIGGER polar_entry_no_delete BEFORE DELETE ON polar_entry BEGIN SELECT RAISE(ABORT, 'polar_entry is append-only'); END;
CREATE TRIGGER polar_entry_no_replace BEFORE INSERT ON polar_entry WHEN EXISTS (SELECT 1 FROM polar_entry WHERE transaction_id = NEW.transaction_id AND line = NEW.line) BEGIN SELECT RAISE(FAIL, 'polar_entry is append-only'); END;
CREATE TRIGGER polar_entry_no_update BEFORE UPDATE ON polar_entry BEGIN SELECT RAISE(ABORT, 'polar_entry is append-only'); END;
CREATE TRIGGER polar_hold_once_delete BEFORE DELETE ON polar_hold WHEN OLD.state = 'held' BEGIN SELECT RAISE(ABORT, 'polar_hold is resolved once'); END;
CREATE TRIGGER polar_hold_once_update BEFORE UPDATE ON polar_hold WHEN OLD.state <> 'held' OR NEW.cost_bound <> OLD.cost_bound OR (NEW.state = 'held' AND NOT (NEW.seq IS OLD.seq AND NEW.tenant IS OLD.tenant AND NEW.source IS OLD.source AND NEW.request_id IS OLD.request_id AND NEW.attempt IS OLD.attempt AND NEW.project IS OLD.project AND NEW.user_name IS OLD.user_name AND NEW.key_name IS OLD.key_name AND NEW.at IS OLD.at AND NEW.fingerprint IS OLD.fingerprint AND NEW.offer IS OLD.offer AND NEW.currency IS OLD.currency AND NEW.cost_bound IS OLD.cost_bound AND NEW.flops_bound IS OLD.flops_bound AND NEW.held_at IS OLD.held_at AND NEW.state IS OLD.state AND NEW.resolved_at IS OLD.resolved_at AND NEW.cost IS OLD.cost AND NEW.flops IS OLD.flops)) BEGIN SELECT RAISE(ABORT, 'polar_hold is resolved once'); END;
CREATE TRIGGER polar_price_book_no_delete BEFORE DELETE ON polar_price_book BEGIN SELECT RAISE(ABORT, 'polar_price_book is append-only'); END;
CREATE TRIGGER polar_price_book_no_replace BEFORE INSERT ON polar_price_book WHEN EXISTS (SELECT 1 FROM polar_price_book WHERE hash = NEW.hash) BEGIN SELECT RAISE(FAIL, 'polar_price_book is append-only'); END;
CREATE TRIGGER polar_price_book_no_update BEFORE UPDATE ON polar_price_book BEGIN SELECT RAISE(ABORT, 'polar_price_book is append-only'); END;
CREATE TRIGGER polar_price_in_force_no_delete BEFORE DELETE ON polar_price_in_force BEGIN SELECT RAISE(ABORT, 'polar_price_in_force is append-only'); END;
CREATE TRIGGER polar_price_in_force_no_replace BEFORE INSERT ON polar_price_in_force WHEN EXISTS (SELECT 1 FROM polar_price_in_force WHERE seq = NEW.seq) BEGIN SELECT RAISE(FAIL, 'polar_price_in_force is append-only'); END;
CREATE TRIGGER polar_price_in_force_no_update BEFORE UPDATE ON polar_price_in_force BEGIN SELECT RAISE(ABORT, 'polar_price_in_force is append-only'); END;
CREATE TRIGGER polar_prune_no_delete BEFORE DELETE ON polar_prune BEGIN SELECT RAISE(ABORT, 'polar_prune is append-only'); END;
CREATE TRIGGER polar_prune_no_replace BEFORE INSERT ON polar_prune WHEN EXISTS (SELECT 1 FROM polar_prune WHERE id = NEW.id) BEGIN SELECT RAISE(FAIL, 'polar_prune is append-only'); END;
CREATE TRIGGER polar_prune_no_update BEFORE UPDATE ON polar_prune BEGIN SELECT RAISE(ABORT, 'polar_prune is append-only'); END;
CREATE TRIGGER polar_pruned_no_delete BEFORE DELETE ON polar_pruned BEGIN SELECT RAISE(ABORT, 'polar_pruned is append-only'); END;
CREATE TRIGGER polar_pruned_no_replace BEFORE INSERT ON polar_pruned WHEN EXISTS (SELECT 1 FROM polar_pruned WHERE seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)) BEGIN SELECT RAISE(FAIL, 'polar_pruned is append-only'); END;
CREATE TRIGGER polar_pruned_no_update BEFORE UPDATE ON polar_pruned BEGIN SELECT RAISE(ABORT, 'polar_pruned is append-only'); END;
CREATE TRIGGER polar_receipt_no_delete BEFORE DELETE ON polar_receipt WHEN NOT (EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.usage_seq)) BEGIN SELECT RAISE(ABORT, 'polar_receipt is append-only'); END;
CREATE TRIGGER polar_receipt_no_replace BEFORE INSERT ON polar_receipt WHEN EXISTS (SELECT 1 FROM polar_receipt WHERE usage_seq = NEW.usage_seq) BEGIN SELECT RAISE(FAIL, 'polar_receipt is append-only'); END;
CREATE TRIGGER polar_receipt_no_update BEFORE UPDATE ON polar_receipt BEGIN SELECT RAISE(ABORT, 'polar_receipt is append-only'); END;
CREATE TRIGGER polar_schema_no_delete BEFORE DELETE ON polar_schema BEGIN SELECT RAISE(ABORT, 'polar_schema is append-only'); END;
CREATE TRIGGER polar_schema_no_replace BEFORE INSERT ON polar_schema WHEN EXISTS (SELECT 1 FROM polar_schema WHERE version = NEW.version) BEGIN SELECT RAISE(FAIL, 'polar_schema is append-only'); END;
CREATE TRIGGER polar_schema_no_update BEFORE UPDATE ON polar_schema BEGIN SELECT RAISE(ABORT, 'polar_schema is append-only'); END;
CREATE TRIGGER polar_statement_no_delete BEFORE DELETE ON polar_statement BEGIN SELECT RAISE(ABORT, 'polar_statement is append-only'); END;
CREATE TRIGGER polar_statement_no_replace BEFORE INSERT ON polar_statement WHEN EXISTS (SELECT 1 FROM polar_statement WHERE number = NEW.number OR id = NEW.id) BEGIN SELECT RAISE(FAIL, 'polar_statement is append-only'); END;
CREATE TRIGGER polar_statement_no_update BEFORE UPDATE ON polar_statement BEGIN SELECT RAISE(ABORT, 'polar_statement is append-only'); END;
CREATE TRIGGER polar_transaction_no_delete BEFORE DELETE ON polar_transaction BEGIN SELECT RAISE(ABORT, 'polar_transaction is append-only'); END;
CREATE TRIGGER polar_transaction_no_replace BEFORE INSERT ON polar_transaction WHEN EXISTS (SELECT 1 FROM polar_transaction WHERE id = NEW.id OR (tenant = NEW.tenant AND kind = NEW.kind AND reference = NEW.reference)) BEGIN SELECT RAISE(FAIL, 'polar_transaction is append-only'); END;
CREATE TRIGGER polar_transaction_no_update BEFORE UPDATE ON polar_transaction BEGIN SELECT RAISE(ABORT, 'polar_transaction is append-only'); END;
CREATE TRIGGER polar_usage_no_delete BEFORE DELETE ON polar_usage WHEN NOT (EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.seq)) BEGIN SELECT RAISE(ABORT, 'polar_usage is append-only'); END;
CREATE TRIGGER polar_usage_no_replace BEFORE INSERT ON polar_usage WHEN EXISTS (SELECT 1 FROM polar_usage WHERE seq = NEW.seq OR (tenant = NEW.tenant AND source = NEW.source AND request_id = NEW.request_id)) BEGIN SELECT RAISE(FAIL, 'polar_usage is append-only'); END;
CREATE TRIGGER polar_usage_no_update BEFORE UPDATE ON polar_usage BEGIN SELECT RAISE(ABORT, 'polar_usage is append-only'); END;
CREATE UNIQUE INDEX polar_chain_link_once ON polar_chain_link (subject, "key");
CREATE INDEX polar_api_key_by_id ON polar_api_key (key_id, seq);
CREATE INDEX polar_budget_by_scope ON polar_budget (tenant, level, name);
CREATE INDEX polar_credit_note_by_statement ON polar_credit_note (statement);
CREATE INDEX polar_entry_by_account ON polar_entry (tenant, account, currency);
CREATE INDEX polar_hold_by_tenant ON polar_hold (tenant, at);
CREATE INDEX polar_hold_open ON polar_hold (tenant, expires_at) WHERE state = 'held';
CREATE INDEX polar_pruned_by_prune ON polar_pruned (prune_id);
CREATE INDEX polar_reply_by_expiry ON polar_reply (expires_at);
CREATE INDEX polar_statement_by_tenant ON polar_statement (tenant, since);
CREATE INDEX polar_usage_by_tenant ON polar_usage (tenant, started_at);
CREATE INDEX polar_usage_by_time ON polar_usage (started_at);
CREATE INDEX polar_usage_hour_by_tenant ON polar_usage_hour (tenant, hour);
CREATE INDEX polar_usage_hour_by_time ON polar_usage_hour (hour);
CREATE OR REPLACE FUNCTION polar_receipt_guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF TG_OP = 'DELETE' AND (EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.usage_seq)) THEN RETURN OLD; END IF; RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$;
CREATE OR REPLACE FUNCTION polar_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$;
CREATE OR REPLACE FUNCTION polar_usage_guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF TG_OP = 'DELETE' AND (EXISTS (SELECT 1 FROM polar_pruned WHERE polar_pruned.seq = OLD.seq)) THEN RETURN OLD; END IF; RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$;
CREATE TABLE polar_api_key (
	seq BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	key_id VARCHAR(16) NOT NULL,
	name VARCHAR(200) NOT NULL,
	secret_hash VARCHAR(64) NOT NULL,
	tags TEXT NOT NULL,
	scopes TEXT NOT NULL,
	models TEXT NOT NULL,
	tiers TEXT NOT NULL,
	max_tokens INTEGER,
	requests_per_minute INTEGER,
	tokens_per_minute INTEGER,
	parallel INTEGER,
	not_before BIGINT NOT NULL,
	expires_at BIGINT,
	rotated_from VARCHAR(16),
	revoked INTEGER NOT NULL,
	set_at BIGINT NOT NULL,
	PRIMARY KEY (seq)
);
CREATE TABLE polar_budget (
	seq BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	level VARCHAR(10) NOT NULL,
	name VARCHAR(200) NOT NULL,
	unit VARCHAR(3) NOT NULL,
	time_window VARCHAR(10) NOT NULL,
	limit_count BIGINT NOT NULL,
	decimals INTEGER NOT NULL,
	zone VARCHAR(100) NOT NULL,
	over_budget VARCHAR(10) NOT NULL,
	closed INTEGER NOT NULL,
	set_at BIGINT NOT NULL,
	PRIMARY KEY (seq)
);
CREATE TABLE polar_budget_counter (
	seq BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	level VARCHAR(10) NOT NULL,
	name VARCHAR(200) NOT NULL,
	unit VARCHAR(3) NOT NULL,
	time_window VARCHAR(10) NOT NULL,
	starts BIGINT NOT NULL,
	ends BIGINT NOT NULL,
	decimals INTEGER NOT NULL,
	spent BIGINT NOT NULL,
	held BIGINT NOT NULL,
	PRIMARY KEY (seq),
	CONSTRAINT polar_budget_counter_once UNIQUE (tenant, level, name, unit, time_window, starts),
	CONSTRAINT polar_budget_counter_not_negative CHECK (spent >= 0 AND held >= 0)
);
CREATE TABLE polar_chain_anchor (
	id BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	version INTEGER NOT NULL,
	links BIGINT NOT NULL,
	head BYTEA NOT NULL,
	anchored_at BIGINT NOT NULL,
	PRIMARY KEY (id),
	CONSTRAINT polar_chain_anchor_once UNIQUE (tenant)
);
CREATE TABLE polar_chain_head (
	tenant VARCHAR(200) NOT NULL,
	number BIGINT NOT NULL,
	hash BYTEA NOT NULL,
	PRIMARY KEY (tenant)
);
CREATE TABLE polar_chain_link (
	tenant VARCHAR(200) NOT NULL,
	number BIGINT NOT NULL,
	subject VARCHAR(40) NOT NULL,
	key VARCHAR(100) NOT NULL,
	digest BYTEA NOT NULL,
	previous BYTEA NOT NULL,
	hash BYTEA NOT NULL,
	PRIMARY KEY (tenant, number)
);
CREATE TABLE polar_clock (
	id SERIAL NOT NULL,
	boot VARCHAR(200) NOT NULL,
	ahead BIGINT NOT NULL,
	PRIMARY KEY (id),
	CONSTRAINT polar_clock_is_one CHECK (id = 1)
);
CREATE TABLE polar_credit_note (
	number BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	statement BIGINT NOT NULL,
	reference VARCHAR(200) NOT NULL,
	amount TEXT NOT NULL,
	reason TEXT NOT NULL,
	issued_at BIGINT NOT NULL,
	PRIMARY KEY (number),
	CONSTRAINT polar_credit_note_once UNIQUE (tenant, reference),
	FOREIGN KEY(statement) REFERENCES polar_statement (number)
);
CREATE TABLE polar_entry (
	transaction_id BIGINT NOT NULL,
	line INTEGER NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	account VARCHAR(40) NOT NULL,
	currency VARCHAR(3) NOT NULL,
	whole BIGINT NOT NULL,
	rest BIGINT NOT NULL,
	PRIMARY KEY (transaction_id, line),
	FOREIGN KEY(transaction_id) REFERENCES polar_transaction (id)
);
CREATE TABLE polar_hold (
	seq BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	request_id VARCHAR(200) NOT NULL,
	attempt INTEGER NOT NULL,
	project TEXT,
	user_name TEXT,
	key_name TEXT,
	at BIGINT NOT NULL,
	fingerprint VARCHAR(64) NOT NULL,
	offer INTEGER NOT NULL,
	currency VARCHAR(3) NOT NULL,
	cost_bound BIGINT NOT NULL,
	flops_bound BIGINT NOT NULL,
	held_at BIGINT NOT NULL,
	expires_at BIGINT NOT NULL,
	state VARCHAR(10) NOT NULL,
	resolved_at BIGINT,
	cost BIGINT,
	flops BIGINT,
	PRIMARY KEY (seq),
	CONSTRAINT polar_hold_once UNIQUE (tenant, source, request_id, attempt),
	CONSTRAINT polar_hold_state CHECK (state IN ('held', 'settled', 'released', 'expired')),
	CONSTRAINT polar_hold_resolved CHECK ((state = 'held') = (resolved_at IS NULL))
);
CREATE TABLE polar_price_book (
	hash VARCHAR(64) NOT NULL,
	id VARCHAR(100) NOT NULL,
	document TEXT NOT NULL,
	stored_at BIGINT NOT NULL,
	PRIMARY KEY (hash)
);
CREATE TABLE polar_price_in_force (
	seq BIGSERIAL NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	for_all INTEGER NOT NULL,
	put_at BIGINT NOT NULL,
	PRIMARY KEY (seq),
	FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
);
CREATE TABLE polar_probe (
	payload TEXT NOT NULL
);
CREATE TABLE polar_prune (
	id BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	before BIGINT NOT NULL,
	pruned_at BIGINT NOT NULL,
	requests BIGINT NOT NULL,
	totals TEXT NOT NULL,
	PRIMARY KEY (id)
);
CREATE TABLE polar_pruned (
	seq BIGINT NOT NULL,
	prune_id BIGINT NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	request_id VARCHAR(200) NOT NULL,
	content_hash VARCHAR(64) NOT NULL,
	stored_at BIGINT NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	cost BIGINT,
	unrated TEXT,
	PRIMARY KEY (seq),
	CONSTRAINT polar_pruned_once UNIQUE (tenant, source, request_id),
	FOREIGN KEY(prune_id) REFERENCES polar_prune (id)
);
CREATE TABLE polar_receipt (
	usage_seq BIGINT NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	cost BIGINT,
	unrated TEXT,
	PRIMARY KEY (usage_seq)
);
CREATE TABLE polar_reply (
	seq BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	key_hash VARCHAR(64) NOT NULL,
	fingerprint VARCHAR(64) NOT NULL,
	state VARCHAR(10) NOT NULL,
	answer BYTEA,
	claimed_at BIGINT NOT NULL,
	expires_at BIGINT NOT NULL,
	PRIMARY KEY (seq),
	CONSTRAINT polar_reply_once UNIQUE (tenant, key_hash),
	CONSTRAINT polar_reply_state CHECK ((state = 'running') = (answer IS NULL))
);
CREATE TABLE polar_schema (
	version INTEGER NOT NULL,
	applied_at BIGINT NOT NULL,
	PRIMARY KEY (version)
);
CREATE TABLE polar_statement (
	number BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	since BIGINT NOT NULL,
	until BIGINT NOT NULL,
	currency VARCHAR(3) NOT NULL,
	id VARCHAR(40) NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	seq_until BIGINT NOT NULL,
	late TEXT NOT NULL,
	issued_at BIGINT NOT NULL,
	document TEXT NOT NULL,
	PRIMARY KEY (number),
	CONSTRAINT polar_statement_once UNIQUE (id),
	FOREIGN KEY(price_book_hash) REFERENCES polar_price_book (hash)
);
CREATE TABLE polar_transaction (
	id BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	kind VARCHAR(40) NOT NULL,
	reference VARCHAR(200) NOT NULL,
	effective_at BIGINT NOT NULL,
	booked_at BIGINT NOT NULL,
	corrects BIGINT,
	note TEXT,
	PRIMARY KEY (id),
	CONSTRAINT polar_transaction_once UNIQUE (tenant, kind, reference),
	FOREIGN KEY(corrects) REFERENCES polar_transaction (id)
);
CREATE TABLE polar_usage (
	seq BIGSERIAL NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	request_id VARCHAR(200) NOT NULL,
	content_hash VARCHAR(64) NOT NULL,
	record_version INTEGER NOT NULL,
	started_at BIGINT NOT NULL,
	stored_at BIGINT NOT NULL,
	tags TEXT NOT NULL,
	model VARCHAR(200) NOT NULL,
	model_fingerprint VARCHAR(200) NOT NULL,
	router VARCHAR(200) NOT NULL,
	router_version VARCHAR(200) NOT NULL,
	tier VARCHAR(200),
	program TEXT NOT NULL,
	outcome VARCHAR(20) NOT NULL,
	finish_reason VARCHAR(20) NOT NULL,
	error TEXT,
	tokens_input BIGINT NOT NULL,
	tokens_cached BIGINT NOT NULL,
	tokens_output BIGINT NOT NULL,
	visits_prefill TEXT NOT NULL,
	visits_decode TEXT NOT NULL,
	flops_embed BIGINT NOT NULL,
	flops_layers_prefill BIGINT NOT NULL,
	flops_layers_decode BIGINT NOT NULL,
	flops_head BIGINT NOT NULL,
	flops_router BIGINT NOT NULL,
	flops_total BIGINT NOT NULL,
	flops_formula VARCHAR(50) NOT NULL,
	identity_flops BIGINT NOT NULL,
	kv_bytes_peak BIGINT NOT NULL,
	device TEXT NOT NULL,
	dtype TEXT NOT NULL,
	queue_ns BIGINT NOT NULL,
	prefill_ns BIGINT NOT NULL,
	decode_ns BIGINT NOT NULL,
	loops_stopped BIGINT DEFAULT '0' NOT NULL,
	visits_prefill_filled TEXT,
	PRIMARY KEY (seq),
	CONSTRAINT polar_usage_once UNIQUE (tenant, source, request_id)
);
CREATE TABLE polar_usage_hour (
	id BYTEA NOT NULL,
	tenant VARCHAR(200) NOT NULL,
	hour BIGINT NOT NULL,
	tier VARCHAR(200) NOT NULL,
	model VARCHAR(200) NOT NULL,
	source VARCHAR(200) NOT NULL,
	outcome VARCHAR(20) NOT NULL,
	price_book_hash VARCHAR(64) NOT NULL,
	unrated TEXT NOT NULL,
	requests BIGINT NOT NULL,
	tokens_input_millions BIGINT NOT NULL,
	tokens_input_rest BIGINT NOT NULL,
	tokens_cached_millions BIGINT NOT NULL,
	tokens_cached_rest BIGINT NOT NULL,
	tokens_output_millions BIGINT NOT NULL,
	tokens_output_rest BIGINT NOT NULL,
	visits_millions BIGINT NOT NULL,
	visits_rest BIGINT NOT NULL,
	flops_millions BIGINT NOT NULL,
	flops_rest BIGINT NOT NULL,
	identity_flops_millions BIGINT NOT NULL,
	identity_flops_rest BIGINT NOT NULL,
	cost_millions BIGINT NOT NULL,
	cost_rest BIGINT NOT NULL,
	PRIMARY KEY (id)
);
CREATE TRIGGER polar_api_key_no_change BEFORE UPDATE OR DELETE ON polar_api_key FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_api_key_no_truncate BEFORE TRUNCATE ON polar_api_key FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_budget_no_change BEFORE UPDATE OR DELETE ON polar_budget FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_budget_no_truncate BEFORE TRUNCATE ON polar_budget FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_chain_anchor_no_change BEFORE UPDATE OR DELETE ON polar_chain_anchor FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_chain_anchor_no_truncate BEFORE TRUNCATE ON polar_chain_anchor FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_chain_head_forward BEFORE UPDATE ON polar_chain_head FOR EACH ROW WHEN (NEW.number <= OLD.number) EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_chain_head_no_delete BEFORE DELETE ON polar_chain_head FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_chain_link_no_change BEFORE UPDATE OR DELETE ON polar_chain_link FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_chain_link_no_truncate BEFORE TRUNCATE ON polar_chain_link FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_credit_note_no_change BEFORE UPDATE OR DELETE ON polar_credit_note FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_credit_note_no_truncate BEFORE TRUNCATE ON polar_credit_note FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_entry_no_change BEFORE UPDATE OR DELETE ON polar_entry FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_entry_no_truncate BEFORE TRUNCATE ON polar_entry FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_hold_once_delete BEFORE DELETE ON polar_hold FOR EACH ROW WHEN (OLD.state = 'held') EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_hold_once_update BEFORE UPDATE ON polar_hold FOR EACH ROW WHEN (OLD.state <> 'held' OR NEW.cost_bound <> OLD.cost_bound OR (NEW.state = 'held' AND NOT (NEW.seq IS NOT DISTINCT FROM OLD.seq AND NEW.tenant IS NOT DISTINCT FROM OLD.tenant AND NEW.source IS NOT DISTINCT FROM OLD.source AND NEW.request_id IS NOT DISTINCT FROM OLD.request_id AND NEW.attempt IS NOT DISTINCT FROM OLD.attempt AND NEW.project IS NOT DISTINCT FROM OLD.project AND NEW.user_name IS NOT DISTINCT FROM OLD.user_name AND NEW.key_name IS NOT DISTINCT FROM OLD.key_name AND NEW.at IS NOT DISTINCT FROM OLD.at AND NEW.fingerprint IS NOT DISTINCT FROM OLD.fingerprint AND NEW.offer IS NOT DISTINCT FROM OLD.offer AND NEW.currency IS NOT DISTINCT FROM OLD.currency AND NEW.cost_bound IS NOT DISTINCT FROM OLD.cost_bound AND NEW.flops_bound IS NOT DISTINCT FROM OLD.flops_bound AND NEW.held_at IS NOT DISTINCT FROM OLD.held_at AND NEW.state IS NOT DISTINCT FROM OLD.state AND NEW.resolved_at IS NOT DISTINCT FROM OLD.resolved_at AND NEW.cost IS NOT DISTINCT FROM OLD.cost AND NEW.flops IS NOT DISTINCT FROM OLD.flops))) EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_price_book_no_change BEFORE UPDATE OR DELETE ON polar_price_book FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_price_book_no_truncate BEFORE TRUNCATE ON polar_price_book FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_price_in_force_no_change BEFORE UPDATE OR DELETE ON polar_price_in_force FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_price_in_force_no_truncate BEFORE TRUNCATE ON polar_price_in_force FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_prune_no_change BEFORE UPDATE OR DELETE ON polar_prune FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_prune_no_truncate BEFORE TRUNCATE ON polar_prune FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_pruned_no_change BEFORE UPDATE OR DELETE ON polar_pruned FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_pruned_no_truncate BEFORE TRUNCATE ON polar_pruned FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_receipt_no_change BEFORE UPDATE OR DELETE ON polar_receipt FOR EACH ROW EXECUTE FUNCTION polar_receipt_guard();
CREATE TRIGGER polar_receipt_no_truncate BEFORE TRUNCATE ON polar_receipt FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_schema_no_change BEFORE UPDATE OR DELETE ON polar_schema FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_schema_no_truncate BEFORE TRUNCATE ON polar_schema FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_statement_no_change BEFORE UPDATE OR DELETE ON polar_statement FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_statement_no_truncate BEFORE TRUNCATE ON polar_statement FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_transaction_no_change BEFORE UPDATE OR DELETE ON polar_transaction FOR EACH ROW EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_transaction_no_truncate BEFORE TRUNCATE ON polar_transaction FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE TRIGGER polar_usage_no_change BEFORE UPDATE OR DELETE ON polar_usage FOR EACH ROW EXECUTE FUNCTION polar_usage_guard();
CREATE TRIGGER polar_usage_no_truncate BEFORE TRUNCATE ON polar_usage FOR EACH STATEMENT EXECUTE FUNCTION polar_refuse_change();
CREATE UNIQUE INDEX polar_chain_link_once ON polar_chain_link (subject, key);
