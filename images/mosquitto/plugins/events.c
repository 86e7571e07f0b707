#include "events.h"

#include "unreleased.h"
#include "version.h"

int on_message_stored(int event, void *event_data, void *userdata)
{
	const struct mosquitto_base_msg *message = &((struct mosquitto_evt_persist_base_msg *)event_data)->data;
	struct queues *queues = userdata;

	(void)event;
	queues->latest = (struct slot){.id = message->store_id, .bytes = message->payloadlen};
	queues->latest_fingerprint =
		message->qos == 2 ? fingerprint_message(message->source_id, message->topic, message->payload, message->payloadlen) : 0;
	return MOSQ_ERR_SUCCESS;
}

/* Follows right after the message was stored, except for QoS 2: such a message is queued when its publisher releases it. */
int on_message_queued(int event, void *event_data, void *userdata)
{
	const struct mosquitto_client_msg *message = &((struct mosquitto_evt_persist_client_msg *)event_data)->data;
	struct queues *queues = userdata;
	bool is_latest = queues->latest.id == message->store_id;
	uint64_t fingerprint = is_latest ? queues->latest_fingerprint : 0;
	struct slot slot = {.id = message->store_id};
	struct queue *queue;

	(void)event;
	slot.bytes = is_latest ? queues->latest.bytes : table_get(&queues->incoming, slot.id).bytes;
	if(message->direction == DIRECTION_IN){
		slot.owner = owner_session(message->clientid);
		unreleased_store(queues, fingerprint, slot);
		return MOSQ_ERR_SUCCESS;
	}
	/* It is released: who has not received it by the end of this call does not get it. */
	if(fingerprint != 0 || queues->incoming.count > 0){
		unreleased_free(queues, slot.id);
		unreleased_free(queues, fingerprint);
	}
	queue = queues_find(queues, message->clientid, true);
	if(queue){
		queues_count(queues, &queue->waiting, slot);
		queue_update(queues, queue);
	}
	return MOSQ_ERR_SUCCESS;
}

int on_message_dequeued(int event, void *event_data, void *userdata)
{
	const struct mosquitto_client_msg *message = &((struct mosquitto_evt_persist_client_msg *)event_data)->data;
	struct queues *queues = userdata;
	struct queue *queue;

	(void)event;
	if(message->direction == DIRECTION_IN){
		unreleased_remove(queues, message->store_id);
		return MOSQ_ERR_SUCCESS;
	}
	queue = queues_find(queues, message->clientid, false);
	if(queue){
		table_remove(&queue->waiting, message->store_id);
		queue_update(queues, queue);
	}
	return MOSQ_ERR_SUCCESS;
}

/* The session may outlive its connection. */
int on_disconnect(int event, void *event_data, void *userdata)
{
	const struct mosquitto *connection = event == MOSQ_EVT_DISCONNECT ? ((struct mosquitto_evt_disconnect *)event_data)->client
		: ((struct mosquitto_evt_client_offline *)event_data)->client;

	unreleased_free_all(userdata, owner_connection(connection));
	return MOSQ_ERR_SUCCESS;
}

int on_session_end(int event, void *event_data, void *userdata)
{
	const char *client = ((struct mosquitto_evt_persist_client *)event_data)->data.clientid;
	struct queues *queues = userdata;
	struct queue *queue = queues_find(queues, client, false);

	(void)event;
	unreleased_remove_all(queues, owner_session(client));
	if(queue){
		queues_remove(queues, queue);
	}
	return MOSQ_ERR_SUCCESS;
}

int on_subscribed(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_persist_subscription *subscription = event_data;
	struct queues *queues = userdata;
	struct queue *queue = queues_find(queues, subscription->data.clientid, true);

	(void)event;
	if(queue){
		queue_subscribe(queues, queue, subscription->data.topic_filter);
	}
	return MOSQ_ERR_SUCCESS;
}

int on_unsubscribed(int event, void *event_data, void *userdata)
{
	const struct mosquitto_evt_persist_subscription *subscription = event_data;
	struct queue *queue = queues_find(userdata, subscription->data.clientid, false);

	(void)event;
	if(queue){
		queue_unsubscribe(queue, subscription->data.topic_filter);
	}
	return MOSQ_ERR_SUCCESS;
}
