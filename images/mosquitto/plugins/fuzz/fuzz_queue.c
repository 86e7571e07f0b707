/* The queues of workers, through the events that the broker reports, in any order: the counts never pass below zero, and a session that
 * ends leaves nothing. */
#include <string.h>

#include "../events.h"
#include "../unreleased.h"
#include "../version.h"
#include "input.h"

static const char *const CLIENTS[] = {"_ingest_a", "_ingest_b", "press-1", "press-2"};
static const char *const FILTERS[] = {"devices/+/telemetry", "#", "$share/group/devices/#", "$share/broken", "devices/press-1/+"};
static const char *const TOPICS[] = {"devices/press-1/telemetry", "devices/press-2/state", "x", "$SYS/broker"};

/* As long as the largest message. */
static uint8_t payload[UINT8_MAX];

#define PICK(list, byte) ((list)[(byte) % (sizeof(list) / sizeof(*(list)))])

static void apply(struct queues *queues, struct input *input)
{
	uint8_t operation = input_byte(input), first = input_byte(input), second = input_byte(input);
	const char *client = PICK(CLIENTS, first);
	struct mosquitto_evt_persist_base_msg stored = {0};
	struct mosquitto_evt_persist_client_msg queued = {0};
	struct mosquitto_evt_persist_subscription subscription = {0};
	struct mosquitto_evt_persist_client session = {0};

	stored.data = (struct mosquitto_base_msg){.store_id = second + 1u, .payloadlen = first, .qos = first % 3, .topic = (char *)PICK(TOPICS, second),
		.source_id = (char *)client, .payload = payload};
	queued.data = (struct mosquitto_client_msg){.clientid = client, .store_id = second + 1u, .direction = operation & 1};
	subscription.data = (struct mosquitto_subscription){.clientid = (char *)client, .topic_filter = (char *)PICK(FILTERS, second)};
	session.data.clientid = (char *)client;
	switch((operation >> 1) % 8){
		case 0: on_message_stored(MOSQ_EVT_PERSIST_BASE_MSG_ADD, &stored, queues); break;
		case 1: on_message_queued(MOSQ_EVT_PERSIST_CLIENT_MSG_ADD, &queued, queues); break;
		case 2: on_message_dequeued(MOSQ_EVT_PERSIST_CLIENT_MSG_DELETE, &queued, queues); break;
		case 3: on_subscribed(MOSQ_EVT_PERSIST_SUBSCRIPTION_ADD, &subscription, queues); break;
		case 4: on_unsubscribed(MOSQ_EVT_PERSIST_SUBSCRIPTION_DELETE, &subscription, queues); break;
		case 5: on_session_end(MOSQ_EVT_PERSIST_CLIENT_DELETE, &session, queues); break;
		case 6: unreleased_reserve(queues, PICK(TOPICS, second), (struct slot){.id = second + 1u, .bytes = first, .owner = operation}); break;
		default: unreleased_free_all(queues, operation); break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	struct queues queues = {.prefix = strdup("_ingest_"), .max_bytes = 500};

	while(input.size > 0){
		size_t full = 0;

		apply(&queues, &input);
		EXPECT(!queues.incomplete);
		for(size_t i = 0; i < queues.count; i++){
			const struct queue *queue = &queues.list[i];

			EXPECT(!strncmp(queue->client, queues.prefix, strlen(queues.prefix)));
			EXPECT((queue->waiting.count == 0) <= (queue->waiting.bytes == 0));
			EXPECT(queue->waiting.bytes <= 255 * queue->waiting.count && queue->unreleased.bytes <= 255 * queue->unreleased.count);
			full += queue->full;
		}
		EXPECT(queues.full == full);
		queues_block(&queues, PICK(TOPICS, input.size));
	}
	queues_clear(&queues);
	return 0;
}
